"""A stand-in for internvl_chat: its names, signatures and flow of data, in small."""

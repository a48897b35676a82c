"""The trunk of a tower, once for many questions about a picture, and later turns of a chat."""

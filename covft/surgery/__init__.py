"""All that is changed inside a ViT, and how it is undone.

overrides.py    an object that replaces one method of a module, on the instance
layout.py       where images, tokens and channels are in what an FFN gets
split.py        FFNs that a block calls in two halves
slot.py         the module that stands where an FFN stood
linears.py      the linear layers of blocks that can be given updates
attention.py    updates of those outside the FFNs
skipping.py     the blocks that nobody reads
trunk/          the blocks before the first adapted one, once per picture
checks.py       what cannot be wrapped, refused before anything changes
ffns.py         builds the slots, puts them in, takes them out
adapted.py      AdaptedViT: what every changed ViT can do, whatever the method
wrapped.py      WrappedViT: one with mixtures of experts, and what is needed to save or restore it
save_guard.py   recognises transformers' `save_pretrained` around the caller
activation_checkpointing.py   the libraries' own switches
"""

"""Carries the text of a call to the FFNs, in the forward pass and in every recomputation of it.

    scope.py        the text that holds for a call
    carrier.py      its transport to the FFNs
    open_scopes.py  which scopes are open in the running task
    draws.py        random draws that a recomputation repeats
    tower_call.py   what one call of the tower tells about its images

A ViT's blocks pass tokens and nothing else to their FFNs, so the text takes another way. Two things make that hard.

**Scopes.** A `Scope` (text features, and which text each image has) is opened around the calls it holds for. Scopes
form a stack per encoder and running task (a thread or an asyncio task). Each run of the tower adds a scope of its own
with what only that run knows: the padding mask, where each image of a packed batch begins, the seed of random routing.
An FFN reads the top one.

**Recomputation.** Activation checkpointing runs an FFN again during backward: after its scope was closed, after a
second forward with other texts, while another scope is open, or on another thread. The stack then proves nothing.
torch keeps one *frame* object per checkpointed region, and shows it on the stack of saved-tensor hooks both in the
original forward and in the recomputation. So an FFN that runs inside a frame notes its scope for that frame, weakly,
and a recomputation asks the frame. During backward a scope on the stack counts only if it was opened inside the very
recomputation that is running, as happens when a checkpoint encloses the whole encoder call.

Reentrant checkpointing has no frames. It runs the forward without gradients and would silently leave the experts of a
frozen tower without any, so it is recognised and refused.
"""

from covft.conditioning.carrier import Conditioning
from covft.conditioning.open_scopes import Generator
from covft.conditioning.scope import Scope
from covft.conditioning.tower_call import TowerCall

__all__ = ["Conditioning", "Generator", "Scope", "TowerCall"]

"""The trunk: the blocks before the first adapted one, whose outputs no text changes.

states.py  their outputs for some images, which can be picked, repeated and joined
runs.py    runs of the tower that stop at the first adapted block, and runs that start there
cache.py   outputs by the content of pictures, for calls of the tower that other code makes

A tower's own forward runs both times. The first time, an exception leaves it where the first adapted block would begin.
The second time, blocks of the trunk return what they returned then; embeddings, masks and positions are computed again,
which costs little, and so is right for every tower, whatever it passes to its blocks.
"""

from covft.surgery.trunk.cache import TrunkCache, caching, is_cached
from covft.surgery.trunk.runs import Gate, Trunk, has_trunk, record, resumed

__all__ = ["Gate", "Trunk", "TrunkCache", "caching", "has_trunk", "is_cached", "record", "resumed"]

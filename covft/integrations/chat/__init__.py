"""Conversations about pictures, and what a new question does to the features of a picture that was shown before.

chat.py      Chat: asks the model, and remembers
policies.py  the three ways to treat a new question
prompts.py   turns as the model's inputs
memory.py    the KV cache of a conversation, continued where it still fits
"""

from covft.integrations.chat.chat import Chat

__all__ = ["Chat"]

"""The classes of models."""

from vlmeval.vlm.base import BaseModel as BaseModel


class Echo(BaseModel):
    """Answers with the question."""

    def generate_inner(self, message, dataset=None):
        return message[-1]["value"]

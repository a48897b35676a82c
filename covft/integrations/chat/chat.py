"""A conversation about pictures with an attached multimodal LLM."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from covft.errors import ConfigError
from covft.integrations.chat.memory import Memory
from covft.integrations.chat.policies import POLICIES
from covft.integrations.chat.prompts import Prompts, Turn, as_images
from covft.integrations.mllm.attach import get_encoder
from covft.integrations.mllm.attachment import attachment_of, image_id, without_peft
from covft.integrations.mllm.families import base_of
from covft.integrations.mllm.trunk import kept_trunk, trunk_cache
from covft.utils.arguments import check_kinds


class Chat:
    """A conversation about pictures with an attached multimodal LLM.

    The features of a picture depend on the question. A later question about the same picture is treated in one of three
    ways:

    - `"reencode"`: the picture is encoded anew, and what follows it in the conversation is computed anew. The answer is
      exactly that of `model.generate` for the complete conversation.
    - `"keep"`: the features of the first question stay. Only the new tokens are computed. Cheap, but the tower has not
      seen the question.
    - `"append"`: the picture, encoded for the new question, is shown again before it. What was said before stays as it
      was computed. The prompt grows by a picture with every question.

    Args:
        model: An attached model, such as `covft.load_model` returns; also inside a PeftModel.
        processor: Its processor.
        on_new_question: How a later question is treated.
        max_new_tokens: Longest answer, in tokens.
        **generation: Further options of `model.generate`, such as `do_sample` or `streamer`.

    Raises:
        ConfigError: If `on_new_question` is unknown, or `processor` is not a processor with a chat template.
        UnsupportedViTError: If the model is not attached.

    Example:
        >>> chat = covft.Chat(model, processor)  # doctest: +SKIP
        >>> chat.ask("What is left of the cup?", image="kitchen.jpg")  # doctest: +SKIP
        >>> chat.ask("And behind it?")  # doctest: +SKIP
    """

    @check_kinds
    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        on_new_question: str = "reencode",
        *,
        max_new_tokens: int = 256,
        **generation: Any,
    ) -> None:
        if on_new_question not in POLICIES:
            raise ConfigError(
                f"on_new_question={on_new_question!r} is not known.",
                expected=" | ".join(POLICIES),
                got=repr(on_new_question),
                fix="on_new_question='reencode'",
            )
        self._encoder = get_encoder(model)
        self.model, self.on_new_question = model, on_new_question
        self._policy = POLICIES[on_new_question]
        self._prompts = Prompts(processor)
        self._options = {"max_new_tokens": max_new_tokens, **generation}
        target = without_peft(model)
        self._memory = Memory(base_of(target), image_id(target))
        self._trunks = trunk_cache(model)
        self.reset()

    @property
    def history(self) -> list[tuple[str, str]]:
        """Questions and answers so far."""
        return [(turn.question, turn.answer or "") for turn in self._turns]

    @check_kinds
    def ask(self, question: str, image: Any = None) -> str:
        """Ask a question, and return the answer.

        Args:
            question: The question.
            image: A picture that is shown with it: of PIL, the path of a file, or a list of these. None asks about the
                pictures that were shown before.

        Raises:
            ConfigError: If the question is empty, or `image` is not a picture.
            DataError: If a file is missing, or not an image.
        """
        question = question.strip()
        if not question:
            raise ConfigError("The question is empty.", expected="some words", got="''")
        images = as_images(image)
        if self._policy.shows_again and self._turns:
            images = (*self._turns[-1].images, *images)
        turn = Turn(question, images)
        answer = self._answer([*self._turns, turn])
        self._turns.append(Turn(question, images, answer))
        return answer

    @check_kinds
    def reset(self) -> None:
        """Forget the conversation and its pictures."""
        self._turns: list[Turn] = []
        self._routing: dict[int, Tensor] = {}
        self._memory.forget()
        self._trunks.clear()

    def routing(self) -> dict[int, Tensor]:
        """Return the routing weights by which the tower encoded its last pictures, by layer, shape `(B, E)`.

        Empty before the first picture, and where the tower is tuned by a method without experts.
        """
        return dict(self._routing)

    def _answer(self, turns: list[Turn]) -> str:
        inputs = self._on_device(self._prompts.inputs(turns))
        ids = inputs["input_ids"]
        resumed = None if self._policy.rewrites else self._memory.resumed(ids, pictures=bool(turns[-1].images))
        if self._policy.rewrites:
            given = inputs  # the text is read from the prompt
        elif resumed is None:
            given = {**inputs, **self._texts(inputs, turns)}
        else:
            given = {**self._new_part(inputs, turns[-1]), **resumed}
        self._memory.forget()
        generate: Any = self.model.generate
        with kept_trunk(self.model, self._trunks):
            output = generate(**given, return_dict_in_generate=True, **self._options)
        if len(output["sequences"]) == 1 and self._options.get("num_beams", 1) == 1 and not self._policy.rewrites:
            self._memory.note(output)
        if any(turn.images for turn in turns):
            weights = getattr(self._encoder, "routing_weights", dict)()
            self._routing = {layer: weights_BE.clone() for layer, weights_BE in weights.items()}
        return self._prompts.decode(output["sequences"][0, ids.shape[1] :])

    def _texts(self, inputs: dict[str, Any], turns: list[Turn]) -> dict[str, Any]:
        """Return the text of each picture: the question that it was shown with."""
        shown = [turn for turn in turns if turn.images]
        if len(shown) < 2:
            return {"context_text": shown[0].question} if shown else {}
        rows = [len(turn.images) for turn in shown]
        if self._rows(inputs) != sum(rows):  # a picture is several tiles
            rows = [self._rows(self._prompts.inputs([turn])) for turn in shown]
        index = torch.arange(len(shown)).repeat_interleave(torch.tensor(rows))
        return {"context_text": [turn.question for turn in shown], "context_index": index}

    def _rows(self, inputs: dict[str, Any]) -> int:
        """Count the rows of the tower's batch."""
        attachment = attachment_of(self.model)
        assert attachment is not None
        return len(attachment.rows_of_tower({**inputs, "context_text": ""})[0])

    def _new_part(self, inputs: dict[str, Any], turn: Turn) -> dict[str, Any]:
        """Return the token ids of the complete prompt, and the pictures of the last turn alone."""
        ids = inputs["input_ids"]
        part = {name: value for name, value in inputs.items() if getattr(value, "shape", None) == ids.shape}
        if turn.images:
            new = self._on_device(self._prompts.inputs([turn]))
            part |= {name: value for name, value in new.items() if name not in part}
            part["context_text"] = turn.question
        return part

    def _on_device(self, inputs: dict[str, Any]) -> dict[str, Any]:
        device: Any = self.model.device
        dtype: Any = self.model.dtype
        return {
            name: value.to(device, dtype if value.is_floating_point() else None)
            if isinstance(value, torch.Tensor)
            else value
            for name, value in inputs.items()
        }

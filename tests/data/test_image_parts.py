"""Which processors write lists of parts with images, and which take text with their image token."""

import pytest

from covft.data import CHAT_TEMPLATES
from covft.data.chat_template import reads_image_parts
from tests.tiny import processors


@pytest.mark.parametrize("name", ["llava", "internvl", "llava_next"])
def test_processors_of_transformers_read_parts(name):
    assert reads_image_parts(getattr(processors, name)())


@pytest.mark.parametrize("template", ["vicuna_v1", "chatml", "phi_3", None])
def test_templates_for_text_do_not(template):
    processor = processors.llava()
    processor.chat_template = None if template is None else CHAT_TEMPLATES[template]
    assert not reads_image_parts(processor)

"""A fixture that keeps transformers quiet."""

import pytest


@pytest.fixture
def quiet():
    """Silences the log and the progress bars of transformers."""
    from transformers import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    logging.set_verbosity(before)
    logging.enable_progress_bar()

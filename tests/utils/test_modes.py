import pytest
from torch import nn

from covft.utils.modes import in_eval_mode


def test_each_module_has_its_own_mode_again_also_after_an_error():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.Identity()))
    model[0].eval()
    model[1][1].eval()
    with in_eval_mode(model):
        assert not any(module.training for module in model.modules())
    with pytest.raises(KeyError), in_eval_mode(model):
        raise KeyError
    assert [module.training for module in model.modules()] == [True, False, True, True, False]

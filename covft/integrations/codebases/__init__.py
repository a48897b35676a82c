"""Context-aware towers in codebases that bring their own models: nothing of theirs is edited.

    llava        LLaVA and LLaVA-NeXT: `python -m covft.integrations.codebases.llava ... -- their_script ...`
    internvl     InternVL's internvl_chat: `python -m covft.integrations.codebases.internvl ... -- their_script ...`
    ms_swift     ms-swift: a plug-in for `--external_plugins`

The models of transformers itself need none of this; see `covft.attach`.
"""

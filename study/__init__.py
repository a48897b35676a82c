"""The paper's comparison in miniature: LLaVA with a frozen ViT and with CoVFT, in minutes on two cores.

    data/               pictures, questions and answers, the tokenizer
    results/            tables, figures, verdicts and a page, from rows

    weights.py          committed weights with their cards
    towers.py           the small ViT and the text encoder
    backbone.py         the packaged DINOv2-S/14-architecture backbone
    smollm2.py          SmolLM2-135M-Instruct out of its package
    llava.py            transformers' own LLaVA around a tower
    pretrain.py         pretraining of the small ViT and the language model (`python -m study pretrain`)
    probe.py            what the pretrained networks can do

    trunk.py            frozen blocks, run once per image
    batches.py          questions and images as LLaVA batches
    train.py            both stages of LLaVA, with transformers' Trainer
    evaluate.py         generated answers, scores and baselines
    comparison.py       both methods from the same start on the same data
    inspection.py       expert weights and context vectors of held-out questions
    backbone_check.py   the packaged backbone: wrapped, then trained for a few steps

    settings.py         settings of a run
    result.py           measurements of a run
    progress.py         progress bars and wall times
    figures.py          figures of the report
    report.py           one self-contained HTML page
    run.py              all of it in order (`python -m study`)
    cli.py              the command line

The study imports covft; covft never imports the study.
"""

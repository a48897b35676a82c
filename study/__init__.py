"""The paper's comparison in miniature: LLaVA, tuned by CoVFT and by other methods, on two cores or a GPU.

    data/               pictures, questions and answers, the tokenizer
    runs/               resumable runs, one JSON row each: the one place where models are trained and scored
    results/            tables, figures, verdicts and a page, from rows
    demo/               a few runs with one seed, and a page about them (`python -m study`)

    weights.py          committed weights with their cards
    towers.py           the small ViT
    backbone.py         the packaged DINOv2-S/14-architecture backbone
    smollm2.py          SmolLM2-135M-Instruct out of its package
    llava.py            transformers' own LLaVA around a tower
    trunk.py            frozen blocks, run once per image
    pretrain.py         pretraining of the small ViT and the language model (`python -m study pretrain`)
    probe.py            what the pretrained networks can do
    backbone_check.py   the packaged backbone: wrapped, then trained for a few steps
    starts.py           what each start of the experts changes (`python -m study.starts`)
    progress.py         progress bars and wall times
    cli.py              the command line

The study imports covft; covft never imports the study.
"""

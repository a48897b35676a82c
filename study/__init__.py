"""The miniature benchmark: LLaVA from real parts, trained and scored in minutes on two cores.

    sources.py    real pixels: digits, photographs, easy-VQA shapes, drawn shapes, rendered words
    scenes.py     seeded pictures of two to four objects on a 3 x 3 grid, three splits
    tasks.py      ten kinds of question about a scene, with their answers
    words.py      a word-level tokenizer for those questions and answers
    towers.py     the small ViT, the packaged DINOv2-S/14-architecture backbone, the text encoder
    pretrain.py   how the small ViT and the language model came about (`python -m study pretrain`)
    llava.py      Hugging Face's own LLaVA around a tower
    trunk.py      the blocks that nothing trains, run once
    batches.py    questions and pictures as LLaVA batches
    train.py      both stages of LLaVA, with transformers' Trainer
    evaluate.py   generated answers, scores and floors
    report.py     one HTML page with pictures
    run.py        all of it in order (`python -m study`)

Nothing here is imported by the rest of the package except its command line.
"""

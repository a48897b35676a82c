"""What the study asks, about what: pictures made of real pixels, questions and answers, and the words in them.

packages.py         data and weights inside installed packages
converted.py        weights of packages, converted once into the cache
prepared.py         the prepared file, which stands in for the packages
tiles.py            real pixels: digits, photographs, easy-VQA shapes, drawn shapes, rendered words
scenes.py           seeded images of one to four things on a 3 x 3 grid, in three splits: twins and diagrams
questions.py        what each task asks about a scene
tasks.py            the twelve tasks and the conflict; tasks of your own
floors.py           what can be answered without looking, from the data alone
tokenizer.py        a word-level tokenizer and the prompt
word_pictures.py    scenes as text, which the language model is pretrained on
commands.py         `python -m study prepare` and `python -m study pretrain`
"""

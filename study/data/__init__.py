"""What the study asks, about what: pictures made of real pixels, questions and answers, and the words in them.

packages.py         data and weights inside installed packages
tiles.py            real pixels: digits, photographs, easy-VQA shapes, drawn shapes, rendered words
scenes.py           seeded images of two to four objects on a 3 x 3 grid, in three splits
tasks.py            ten kinds of question about a scene, with their answers
tokenizer.py        a word-level tokenizer and the prompt
word_pictures.py    scenes as text, which the language model is pretrained on
"""

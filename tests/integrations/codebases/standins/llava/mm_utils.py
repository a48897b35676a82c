IMAGE_TOKEN_INDEX = -200


def tokenizer_image_token(prompt, tokenizer, image_token_index=IMAGE_TOKEN_INDEX):
    """Ids of a prompt, each `<image>` being one placeholder."""
    ids = []
    for number, piece in enumerate(prompt.split("<image>")):
        ids += [image_token_index] * (number > 0) + tokenizer(piece, add_special_tokens=False)["input_ids"]
    return ids

from covft.utils.tables import aligned

ROWS = [("", "mean", "n"), ("all", "0.5", "10"), ("captions", "12.25", "")]


def test_columns_are_aligned():
    assert aligned(ROWS) == [
        "          mean   n",
        "all       0.5    10",
        "captions  12.25",
    ]
    assert aligned(ROWS, right=True) == [
        "           mean   n",
        "all         0.5  10",
        "captions  12.25",
    ]

"""The words of the embedded model. The order fixes the token ids and so belongs to the shipped weights."""

COLORS = ("red", "green", "blue", "yellow", "cyan", "magenta", "white", "orange")
DIGITS = tuple(str(i) for i in range(10))
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
#: What an object can be: index 0-9 a handwritten digit, 10-15 a drawn shape.
CLASSES = DIGITS + SHAPES

PAD, BOS, EOS, IMAGE, UNKNOWN = "<pad>", "<s>", "</s>", "<image>", "<unk>"
_FUNCTION_WORDS = (
    "user assistant : ? what digit color shape is the there a how many objects beside read number yes no none empty"
    " of in image"
)
WORDS = (PAD, BOS, EOS, IMAGE, *_FUNCTION_WORDS.split(), *CLASSES, *COLORS, *"after before digits shapes".split())
#: The words of the video model: the same, and some more.
VIDEO = "<video>"
VIDEO_WORDS = (*WORDS, VIDEO, *"first last where moving left right up down".split())
#: Rows of the embedding table; the rows behind the known words are spare (the first of them is ``<unk>``).
VOCAB_SIZE = 64
VIDEO_VOCAB_SIZE = 72
WORD_ID = {word: i for i, word in enumerate(VIDEO_WORDS)}

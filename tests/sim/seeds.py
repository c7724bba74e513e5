"""Seeds that found something, each with a sentence. They are played again with every change.

What a seed holds changes with the code that runs in it, so each bug has a test of its own besides.
"""

FOUND: dict[int, str] = {
    2: "The request for a snapshot was lost on a stream: its turn stayed taken, and it was never asked for again.",
    3: "The delta with a model's dictionary was lost on a stream, and every later block of the model was skipped.",
    4: "A connection to a hanging worker failed after everybody had given up waiting, and its error went unseen.",
    17: "A worker whose disk had just failed could not stop: the failed write's traceback still held its buffer.",
    76: "Redis was set back to an old dump: two elections drew one epoch, and the second's changes passed for known.",
    100: "A namespace over its quota: its policy's order was wider than 64 bits, and every put failed.",
}

"""Who listens to a training in tests."""


class Messages:
    """Keeps what it was told."""

    def __init__(self):
        self.told = []

    def step(self, epoch, step, steps):
        pass

    def epoch(self, row):
        pass

    def message(self, text):
        self.told.append(text)

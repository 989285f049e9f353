"""Reporter for tests that keeps the messages and images of a run."""

from stages.runtime.context import Reporter


class Screen(Reporter):
    """Reporter that keeps the text of each message and the name of each image."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.images: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)

    def image(self, name: str, png: bytes, step: int) -> None:
        self.images.append(name)

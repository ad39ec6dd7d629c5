"""Text to ids and back, with BAGEL's four special tokens."""

from pathlib import Path

from tokenizers import Tokenizer as _Tokenizer

from bagel_opt.config import SpecialTokens
from bagel_opt.errors import CheckpointError, reason

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")


class Tokenizer:
    """A checkpoint's tokenizer.json.

    Raises FileNotFoundError where the file is missing and `error` where it cannot be read.
    """

    def __init__(self, path: Path, error: type[ValueError] = CheckpointError):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; copy the checkpoint's tokenizer.json there")
        try:
            self._tokenizer = _Tokenizer.from_file(str(path))
        except Exception as bad:  # the library raises bare Exception
            raise error(f"{path} is not a readable tokenizer: {reason(bad)}") from None
        # Settings that some tokenizer.json carry from training; the official tokenizer heeds neither.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Tokens that are there already keep their ids; missing ones go to the end, as in the official code.
        self._tokenizer.add_special_tokens(list(SPECIAL))
        self.special = SpecialTokens(*(self._tokenizer.token_to_id(token) for token in SPECIAL))

    @property
    def largest_id(self) -> int:
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values())

    def encode(self, text: str) -> list[int]:
        """Ids of `text` alone, without the text block's start and end."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def block(self, text: str) -> tuple[int, ...]:
        """A text block: <|im_start|> ids <|im_end|>."""
        return (self.special.bos_token_id, *self.encode(text), self.special.eos_token_id)

    def decode(self, ids: list[int]) -> str:
        """What was said between <|im_start|> (the first id) and <|im_end|>, cut as the official code cuts it."""
        text = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text.split(SPECIAL[1])[0].split(SPECIAL[0])[1]

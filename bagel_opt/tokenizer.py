"""Text to ids and back, with BAGEL's four special tokens."""

from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as _Tokenizer

from bagel_opt.config import SpecialTokens
from bagel_opt.errors import CheckpointError, reason
from bagel_opt.json_files import read_json

TOKEN_FIELDS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
# Contractions; letters after at most one other sign; single digits; signs; line ends; blanks, but for the last before a word.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")


class Tokenizer:
    """A checkpoint's tokenizer.json, or what vocab.json and merges.txt beside it say as Qwen2's tokenizer.

    Raises FileNotFoundError where neither is there and `error` where they cannot be read.
    """

    def __init__(self, path: Path, error: type[ValueError] = CheckpointError):
        parts = path.with_name("vocab.json"), path.with_name("merges.txt")
        if not path.is_file() and not all(part.is_file() for part in parts):
            raise FileNotFoundError(f"{path} is missing; copy it there, or the checkpoint's vocab.json and merges.txt")
        try:
            self._tokenizer = _Tokenizer.from_file(str(path)) if path.is_file() else _qwen2(*parts, error)
        except error:
            raise
        except Exception as bad:  # the library raises bare Exception
            raise error(f"{path} is not a readable tokenizer: {reason(bad)}") from None
        # Settings that some tokenizer.json carry from training; the official tokenizer heeds neither.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Tokens that are there already keep their ids; missing ones go to the end, as in the official code.
        self._tokenizer.add_special_tokens(list(SPECIAL))
        self.special = SpecialTokens(*(self._tokenizer.token_to_id(token) for token in SPECIAL))

    def write(self, path: Path) -> None:
        """As a tokenizer.json."""
        self._tokenizer.save(str(path))

    @property
    def largest_id(self) -> int:
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values())

    def encode(self, text: str) -> list[int]:
        """Ids of `text` alone, without the text block's start and end."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def block(self, text: str) -> tuple[int, ...]:
        """A text block: <|im_start|> ids <|im_end|>."""
        return (self.special.bos_token_id, *self.encode(text), self.special.eos_token_id)

    def answer(self, ids: list[int]) -> str:
        """What was said after the first id, up to <|im_end|>, without blanks around it, as Lance's official code cuts it."""
        return self._tokenizer.decode(ids[1:], skip_special_tokens=False).split(SPECIAL[1])[0].strip()

    def decode(self, ids: list[int]) -> str:
        """What was said between <|im_start|> (the first id) and <|im_end|>, cut as the official code cuts it."""
        text = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text.split(SPECIAL[1])[0].split(SPECIAL[0])[1]


def _qwen2(vocab: Path, merges: Path, error: type[ValueError]) -> _Tokenizer:
    """Byte-level BPE as Qwen2 splits words (Qwen2.5 technical report, and its published tokenizer.json)."""
    made = _Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    made.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(WORDS), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    settings = vocab.with_name("tokenizer_config.json")
    added = read_json(settings, error).get("added_tokens_decoder", {}) if settings.is_file() else {}
    for number, token in sorted(added.items(), key=lambda item: int(item[0])):
        made.add_tokens([AddedToken(**{name: token[name] for name in TOKEN_FIELDS if name in token})])
        if made.token_to_id(token["content"]) != int(number):
            raise error(f"{settings}: token {token['content']!r:.60} would not get its number {number}")
    return made

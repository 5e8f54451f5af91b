"""Decode the text of a DICOM value or of a file name when the declared character set is wrong or missing.

Many senders write GBK or UTF-8 and declare ISO_IR 100 or nothing. The bytes outrank the header, but only where they leave no doubt:
another encoding is used when the declared one does not fit the bytes and exactly one other does. What stays doubtful is flagged.
The file keeps its original bytes.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from pydicom.charset import convert_encodings, decode_bytes

# PS3.3 C.12.1.1.2: these are never combined with code extensions.
_UTF8: Final = "ISO_IR 192"
_CHINESE: Final = ("GB18030", "GBK", "ISO 2022 GBK")
_LATIN: Final = ("ISO_IR 100", "ISO 2022 IR 100")
_ASCII: Final = ("", "ISO_IR 6", "ISO 2022 IR 6")
# PS3.5 K.2: designates GB 2312 as G1, in which each byte of a character has its highest bit set.
_GB2312_ESCAPE: Final = b"\x1b$)A"
_HIGH_RUN: Final = re.compile("[\x80-\xff]+")
_LATIN_WORD: Final = re.compile("[A-Za-z\xc0-\xd6\xd8-\xf6\xf8-\xff]+")
_NAME_DELIMITERS: Final = {0x5E, 0x3D}
_CJK_RANGES: Final = (
    (0x2010, 0x2027), (0x2030, 0x203B), (0x2160, 0x217F), (0x2460, 0x249B), (0x3001, 0x3015), (0x3400, 0x4DBF), (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF), (0xFF01, 0xFF5E), (0x20000, 0x323AF), (0x3000, 0x3000), (0xB7, 0xB7), (0xB0, 0xB1), (0xD7, 0xD7),
)  # fmt: skip

_Decoder: TypeAlias = Callable[[bytes], "str | None"]


@dataclass(frozen=True)
class DecodedText:
    """A decoded value.

    Attributes:
        text: the value in Unicode.
        encoding: the encoding in use where it is not the declared one (``GB18030``, ``UTF-8``, ``ISO 8859-1``), else empty.
        is_doubtful: no encoding fits without doubt; ``text`` may be wrong.
    """

    text: str
    encoding: str = ""
    is_doubtful: bool = False


def decode_text(raw: bytes, declared: Sequence[str] = ()) -> DecodedText:
    """Decode a text value.

    Args:
        raw: the bytes of the value, of any multiplicity.
        declared: the values of Specific Character Set (0008,0005); empty: none.
    """
    raw = raw.rstrip(b"\0 ")
    if raw.isascii():
        return _with_escapes(raw, declared) if b"\x1b" in raw else DecodedText(raw.decode("ascii"))
    if b"\x1b" in raw:
        return _with_escapes(raw, declared)
    first = (declared[0] if declared else "").strip().upper()
    if first == _UTF8:
        return _declared_utf8(raw)
    if first in _CHINESE:
        return _first_of(raw, _as_utf8_chinese, _as_gb18030, own="GB18030")
    if first in _LATIN:
        if is_plausible_latin(raw):
            return DecodedText(raw.decode("latin-1"))
        return _first_of(raw, _as_undeclared_utf8, _as_chinese, own="", fallback="latin-1")
    if first in _ASCII:  # bytes above 127 are not allowed at all
        return _first_of(raw, _as_undeclared_utf8, _as_chinese, own="", fallback="latin-1")
    return _declared_or_utf8(raw, declared)


def decode_file_name(raw: bytes) -> str:
    """Decode a file name of an archive: UTF-8, else GB18030, as Chinese Windows writes it."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("gb18030", "replace")


def is_plausible_latin(raw: bytes) -> bool:
    """Whether bytes above 127 are what European text has: single ones, or several in a word with ASCII letters too (Größe)."""
    text = raw.decode("latin-1")
    if any("\x80" <= char < "\xa0" for char in text):
        return False
    return all(len(match[0]) == 1 or _is_in_latin_word(text, match) for match in _HIGH_RUN.finditer(text))


def _is_in_latin_word(text: str, run: re.Match[str]) -> bool:
    """Whether a run of characters above 127 is part of a word with ASCII letters, in capitals, small letters or capitalised."""
    word = next((match[0] for match in _LATIN_WORD.finditer(text) if match.end() > run.start()), "")
    has_ascii = any(char.isascii() for char in word)
    return run[0] in word and has_ascii and (word.islower() or word.isupper() or word.istitle())


def _first_of(raw: bytes, *decoders: _Decoder, own: str, fallback: str = "utf-8") -> DecodedText:
    """Return the first reading that fits; ``own`` is the declared encoding, about which nothing is noted."""
    for decode in decoders:
        text = decode(raw)
        if text is not None:
            encoding = _ENCODINGS[decode]
            return DecodedText(text, "" if encoding == own else encoding)
    if own == "UTF-8" and is_plausible_latin(raw):
        return DecodedText(raw.decode("latin-1"), "ISO 8859-1", is_doubtful=True)
    return DecodedText(raw.decode(fallback, "replace"), is_doubtful=True)


def _declared_utf8(raw: bytes) -> DecodedText:
    """Declared UTF-8: as declared where that fits, unless it also is common Chinese and no name of one alphabet (the bytes of 薛^伟)."""
    text = _as_utf8(raw)
    chinese = _as_chinese(raw)
    if text is None or chinese is None or _as_undeclared_utf8(raw) is not None:
        return _first_of(raw, _as_utf8, _as_chinese, own="UTF-8")
    return DecodedText(text, is_doubtful=True) if _is_name_of_one_alphabet(text) else DecodedText(chinese, "GB18030")


def _is_name_of_one_alphabet(text: str) -> bool:
    """Whether words are capitalised as names are, have letters of one alphabet in use today, and are more than initials."""
    words = re.findall(r"\w+", text)
    letters = [char for char in text if not char.isascii()]
    alphabets = {unicodedata.name(char, "").partition(" ")[0] for char in letters}
    is_historic = any("\u0460" <= char <= "\u0489" for char in letters)
    is_capitalised = all(word.istitle() or word.isupper() for word in words)
    return len(alphabets) == 1 and not is_historic and is_capitalised and any(len(word) > 1 for word in words)


def _as_utf8(raw: bytes) -> str | None:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _as_undeclared_utf8(raw: bytes) -> str | None:
    """UTF-8 where it is not declared: not if characters of two bytes are also common Chinese characters that stand apart from Latin."""
    text = _as_utf8(raw)
    if text is None or any(ord(char) >= 0x800 for char in text) or re.search(rb"[A-Za-z0-9][\x80-\xff]|[\x80-\xff][A-Za-z0-9]", raw):
        return text
    chinese = _as_chinese(raw)
    is_chinese = chinese is not None and all(char.isascii() or _is_gb2312(char) for char in chinese)
    return None if is_chinese else text


def _as_utf8_chinese(raw: bytes) -> str | None:
    """UTF-8 where GBK is declared: only Chinese characters of three bytes prove it, since two bytes may be one character of GBK."""
    text = _as_utf8(raw)
    is_chinese = text is not None and all(char.isascii() or (_is_cjk(char) and ord(char) >= 0x800) for char in text)
    return text if is_chinese else None


def _as_gb18030(raw: bytes) -> str | None:
    try:
        return raw.decode("gb18030")
    except UnicodeDecodeError:
        return None


def _as_chinese(raw: bytes) -> str | None:
    """GB18030 where it is not declared: at least half of the characters are in GB 2312, the others Chinese too, and it is not Latin."""
    text = None if is_plausible_latin(raw) else _as_gb18030(raw)
    if text is None:
        return None
    others = [char for char in text if not char.isascii()]
    if not all(map(_is_cjk, others)):
        return None
    common = sum(1 for char in others if _is_gb2312(char))
    return text if 2 * common >= len(others) else None


def _is_cjk(char: str) -> bool:
    return any(low <= ord(char) <= high for low, high in _CJK_RANGES)


def _is_gb2312(char: str) -> bool:
    try:
        return bool(char.encode("gb2312"))
    except UnicodeEncodeError:
        return False


def _declared_or_utf8(raw: bytes, declared: Sequence[str]) -> DecodedText:
    """Another declared set: as declared, unless it cannot be decoded so, or two or more characters of it are valid UTF-8."""
    utf8 = _as_utf8(raw)
    if utf8 is not None and sum(1 for char in utf8 if not char.isascii()) > 1 and len(raw) - len(utf8) > 1:
        return DecodedText(unicodedata.normalize("NFC", utf8), "UTF-8")
    try:
        return DecodedText(raw.decode(convert_encodings(list(declared))[0]))
    except (UnicodeDecodeError, LookupError):
        return _first_of(raw, _as_undeclared_utf8, _as_chinese, own="", fallback="latin-1")


def _with_escapes(raw: bytes, declared: Sequence[str]) -> DecodedText:
    """Text with code extensions (PS3.5 6.1.2.5); GB 2312 by its escape sequence, everything else by pydicom."""
    if _GB2312_ESCAPE in raw or any(name.strip().upper() in _CHINESE for name in declared):
        text = _as_gb18030(raw.replace(_GB2312_ESCAPE, b"").replace(b"\x1b(B", b""))
        if text is not None and "\x1b" not in text:
            return DecodedText(text)
    try:
        text = decode_bytes(raw, convert_encodings(list(declared) or [""]), _NAME_DELIMITERS)
    except (UnicodeDecodeError, LookupError, ValueError):
        text = raw.decode("latin-1")
    is_left = "\x1b" in text or "\ufffd" in text
    return DecodedText(text.replace("\x1b", ""), is_doubtful=is_left)


_ENCODINGS: Final[dict[_Decoder, str]] = {
    _as_utf8: "UTF-8",
    _as_undeclared_utf8: "UTF-8",
    _as_utf8_chinese: "UTF-8",
    _as_gb18030: "GB18030",
    _as_chinese: "GB18030",
}

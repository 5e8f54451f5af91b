"""Passwords: argon2 hashes, one-time passwords, and the two profiles of rules for a new one (R2, ADR 0041).

``asvs`` follows OWASP ASVS 4.0, 2.1: length and a list of common passwords, no forced change. ``mlps3`` follows GB/T 22239-2019, 8.1.4.1:
complexity, a change every 90 days, no reuse. They contradict each other, so the clinic chooses by a setting.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
import secrets
from collections.abc import Iterator, Sequence
from typing import Final, Literal

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerifyMismatchError

Profile = Literal["asvs", "mlps3"]
MIN_PASSWORD_CHARS: Final = 8
MAX_PASSWORD_CHARS: Final = 256
ROTATION_S: Final = 90 * 86400.0
HISTORY: Final = 5
_CLASSES_NEEDED: Final = 3
_CLASSES: Final = ("[a-z]", "[A-Z]", r"[0-9]", r"[^a-zA-Z0-9]")

# RFC 9106's second recommended option scaled to a small box: 19 MiB, two passes (the minimum that OWASP recommends).
_HASHER: Final = PasswordHasher(time_cost=2, memory_cost=19 * 1024, parallelism=1)
# Checked in place of an unknown account's, so that the answer takes the same time.
UNKNOWN_HASH: Final = _HASHER.hash(secrets.token_hex(16))
# Without the letters and digits that people confuse on paper.
_READABLE_CHARS: Final = "abcdefghjkmnpqrstuvwxyz23456789"


def readable_secret(groups: int = 3) -> str:
    """A random secret that a person can copy from paper: groups of four characters, 20 bits each."""
    return "-".join("".join(secrets.choice(_READABLE_CHARS) for _ in range(4)) for _ in range(groups))


def hash_password(password: str) -> str:
    """The argon2id hash of a password, as it is stored."""
    return _HASHER.hash(password)


def verify_password(password_hash: str, password: str) -> bool:
    """Whether a password fits a hash; takes one core and 19 MiB for some hundredths of a second."""
    try:
        return _HASHER.verify(password_hash, password)
    except (VerifyMismatchError, InvalidHashError):
        return False


def is_due(profile: Profile, age_s: float) -> bool:
    """Whether the profile asks for a new password after this time; an unknown age (infinite) begins to count at the next login."""
    return profile == "mlps3" and ROTATION_S < age_s < math.inf


def weakness(profile: Profile, new: str, username: str, former_hashes: Sequence[str]) -> str:
    """Why a new password is refused, as a code; empty where it may be used.

    Args:
        profile: the rules of the clinic.
        new: the password.
        username: of its account.
        former_hashes: the present password's hash and, for ``mlps3``, the ones before.
    """
    if len(new) < MIN_PASSWORD_CHARS or len(set(new)) < 4:
        return "account.weak_password"
    if len(new) > MAX_PASSWORD_CHARS:
        return "account.long_password"
    if is_common(new) or _is_like(username, new):
        return "account.common_password"
    if profile == "mlps3" and sum(re.search(kind, new) is not None for kind in _CLASSES) < _CLASSES_NEEDED:
        return "account.password_classes"
    former = former_hashes[: HISTORY if profile == "mlps3" else 1]
    return "account.reused_password" if any(verify_password(item, new) for item in former) else ""


def is_common(password: str) -> bool:
    """Whether a password is one that guessers try first: in the list, or a date, a run or a repetition."""
    return any(text in common_passwords() or _is_date(text) or _is_run(text) or _is_repetition(text) for text in _variants(password))


def _is_like(username: str, password: str) -> bool:
    """Whether a password is the user name, alone or with a few digits or signs around it."""
    name = username.casefold()
    return len(name) >= 3 and any(name in text and len(text) - len(name) < 5 for text in _variants(password))


_SIGNS_AS_LETTERS: Final = str.maketrans("@$!", "asi")
_DIGITS_AS_LETTERS: Final = str.maketrans("0135", "oies")


def _variants(password: str) -> set[str]:
    """What a password means to a guesser: in lower case, without signs, signs and digits as the letters that they stand for."""
    lower = password.casefold()
    word = lower.rstrip("0123456789!@#$.*_-")
    spelt = word.translate(_SIGNS_AS_LETTERS).translate(_DIGITS_AS_LETTERS)
    whole = {lower, re.sub(r"[\W_]", "", lower), spelt + re.sub(r"[\W_]", "", lower[len(word) :])}
    return {text for text in whole if len(text) >= 4} | ({spelt} if len(spelt) >= MIN_PASSWORD_CHARS else set())


def _is_date(text: str) -> bool:
    """Eight digits that can be a date: year first, day first or month first."""
    if not re.fullmatch(r"\d{8}", text):
        return False
    orders = ((text[:4], text[4:6], text[6:]), (text[4:], text[2:4], text[:2]), (text[4:], text[:2], text[2:4]))
    return any(1900 <= int(year) <= 2099 and 1 <= int(month) <= 12 and 1 <= int(day) <= 31 for year, month, day in orders)


def _is_run(text: str) -> bool:
    """Each character follows the one before (abcdefgh, 98765432), or one of it is beside the other on the keyboard."""
    steps = {ord(after) - ord(before) for before, after in itertools.pairwise(text)}
    return steps in ({1}, {-1}) or any(text in row or text in row[::-1] for row in _keyboard_runs())


def _is_repetition(text: str) -> bool:
    """The same one to four characters over and over, or each character several times (11112222)."""
    groups = [len(list(run)) for _, run in itertools.groupby(text)]
    return re.fullmatch(r"(.{1,4})\1+", text) is not None or min(groups) >= 2


_ROWS: Final = ("1234567890", "qwertyuiop", "asdfghjkl", "zxcvbnm")


@functools.cache
def _keyboard_runs() -> tuple[str, ...]:
    """Runs over the keyboard: rows, columns, zigzags between two rows."""
    columns = ["".join(column) for column in itertools.zip_longest(*_ROWS, fillvalue="")]
    zigzags = ["".join(itertools.chain.from_iterable(zip(upper, lower, strict=False))) for upper, lower in itertools.pairwise(_ROWS)]
    return (*(row * 2 for row in _ROWS), "".join(columns), "".join(column[::-1] for column in columns), *zigzags, "".join(_ROWS))


# What people take for a start: words of computers and clinics, surnames and given names in pinyin, keyboard beginnings.
_WORDS: Final = (
    "password", "passwort", "admin", "administrator", "root", "user", "test", "guest", "demo", "login", "welcome", "letmein", "changeme",
    "default", "secret", "master", "system", "server", "computer", "internet", "dragon", "monkey", "sunshine", "princess", "football",
    "iloveyou", "love", "happy", "hello", "china", "beijing", "shanghai", "qwerty", "qwer", "asdf", "zxcv", "qaz", "qazwsx", "abc", "abcd",
    "clinic", "clinicbox", "hospital", "doctor", "nurse", "radiology", "health", "medical", "dicom", "pacs", "yisheng", "yiyuan",
    "weishengyuan", "zhensuo", "hushi", "fangshe", "fangsheke", "xray", "mima", "woaini", "woaizhongguo", "nihao", "zhongguo", "guanliyuan",
)  # fmt: skip
_SURNAMES: Final = (
    "wang", "li", "zhang", "liu", "chen", "yang", "zhao", "huang", "zhou", "wu", "xu", "sun", "hu", "zhu", "gao", "lin", "he", "guo", "ma",
    "luo",
)  # fmt: skip
_GIVEN: Final = ("wei", "fang", "na", "min", "jing", "lei", "jun", "yan", "yong", "jie", "juan", "tao", "ming", "chao", "xiuying", "hua")
_ENDINGS: Final = (
    "1", "12", "123", "1234", "12345", "123456", "1234567", "12345678", "123456789", "321", "111", "111111", "000000", "88", "888", "8888",
    "666", "6666", "520", "521", "1314", "5201314", "163", "110", "119", "120", "a", "abc", "a123", "001", "007",
)  # fmt: skip
_YEARS: Final = tuple(str(year) for year in range(1950, 2036))


@functools.cache
def common_passwords() -> frozenset[str]:
    """Common passwords of at least eight characters, made by rules: a word or a name with an ending, an ending before a word, two words.

    Shorter ones are refused by their length alone. Nothing is copied from a list of stolen passwords.
    """
    return frozenset(text for text in _combinations() if len(text) >= MIN_PASSWORD_CHARS)


def _combinations() -> Iterator[str]:
    names = [surname + given for surname in _SURNAMES for given in ("", *_GIVEN)]
    yield from (*_WORDS, *names)
    yield from map("".join, itertools.product((*_WORDS, *names), (*_ENDINGS, *_YEARS)))
    yield from map("".join, itertools.product((*_ENDINGS, *_YEARS), _WORDS))
    yield from map("".join, itertools.product(_WORDS, _WORDS))

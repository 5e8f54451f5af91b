"""Text whose declared character set is wrong: the bytes decide where they leave no doubt, a true Latin-1 name stays."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.ingest.text_encoding import decode_text

_SURNAMES = (
    "王李张刘陈杨黄赵周吴徐孙马胡朱郭何罗高林郑梁谢唐许冯宋韩邓彭曹曾田萧潘袁蔡蒋余于杜叶程魏苏吕丁沈任姚"
    "卢傅钟姜崔谭廖范汪陆金石戴贾韦夏邱方侯邹熊孟秦白江阎薛尹段雷黎史龙陶贺顾毛郝龚邵万钱覃武戚"
)
_GIVEN = (
    "伟芳娜秀英敏静丽强磊军洋勇艳杰娟涛明超霞平刚桂珍玉萍红鹏华建国志文斌宇浩凯健俊帆雪婷慧莹鑫淼喆镕堃琪瑶晨曦梓涵轩睿昊嘉怡欣悦思雨诗"
)
chinese_names = st.builds(
    lambda surname, given, caret: f"{surname}{caret}{given}",
    st.sampled_from(_SURNAMES),
    st.text(_GIVEN, min_size=1, max_size=2),
    st.sampled_from(["^", ""]),
)
_WRONG = [[], [""], ["ISO_IR 6"], ["ISO_IR 100"], ["ISO_IR 192"], ["ISO 2022 IR 100"], ["", "ISO 2022 IR 58"]]
_LATIN = (
    "Müller^Jörg", "MÜLLER^JÖRG", "Größe^Ärger", "Conceição^João", "CONCEIÇÃO^JOÃO", "Piñón^Ángel", "Þórður^Sigurðsson", "Lefèvre^Zoé",
    "Å^Ö", "Øye^Bjørn", "ÉTÉ", "Thorax 30° ±2", "Groß^Süß", "García^José", "Åström^Göran", "Nuñez", "ÖZ^ALI", "Öz^Ali", "Désirée",
)  # fmt: skip


@given(chinese_names, st.sampled_from(_WRONG), st.sampled_from(["gb18030", "utf-8"]))
def test_chinese_under_a_wrong_header(name: str, declared: list[str], encoding: str) -> None:
    decoded = decode_text(name.encode(encoding), declared)
    if decoded.is_doubtful:  # its GBK is also a capitalised word of another alphabet in UTF-8, as declared
        assert (encoding, declared) == ("gb18030", ["ISO_IR 192"])
        return
    assert decoded.text == name
    is_right = (encoding, declared) == ("utf-8", ["ISO_IR 192"])
    assert decoded.encoding == ("" if is_right else {"gb18030": "GB18030", "utf-8": "UTF-8"}[encoding])


@pytest.mark.parametrize(
    ("raw", "text", "is_doubtful"),
    [
        ("薛^伟".encode("gbk"), "薛^伟", False),  # in UTF-8 a historic Cyrillic letter and a Greek one
        ("谢^小".encode("gbk"), "谢^小", False),  # in UTF-8 two Cyrillic letters, the first one small
        ("Хан^Шани".encode(), "Хан^Шани", True),  # in GBK common Chinese characters
        ("Иванов^Иван".encode(), "Иванов^Иван", False),
        ("Ёлкин^Ян".encode(), "Ёлкин^Ян", False),
        ("Παπάς^Νίκος".encode(), "Παπάς^Νίκος", False),
        ("Müller^Jörg".encode(), "Müller^Jörg", False),
        ("张^伟".encode(), "张^伟", False),
    ],
)
def test_bytes_that_are_valid_in_two_encodings_under_utf8(raw: bytes, text: str, is_doubtful: bool) -> None:
    decoded = decode_text(raw, ["ISO_IR 192"])
    assert (decoded.text, decoded.is_doubtful) == (text, is_doubtful)


@given(chinese_names, st.sampled_from(["GB18030", "GBK", "ISO 2022 GBK"]), st.sampled_from(["gb18030", "utf-8"]))
def test_utf8_under_a_chinese_header(name: str, declared: str, encoding: str) -> None:
    decoded = decode_text(name.encode(encoding), [declared])
    assert (decoded.text, decoded.is_doubtful) == (name, False)


@pytest.mark.parametrize("name", _LATIN)
def test_a_true_latin_name_stays(name: str) -> None:
    decoded = decode_text(name.encode("latin-1"), ["ISO_IR 100"])
    assert (decoded.text, decoded.encoding, decoded.is_doubtful) == (name, "", False)


@pytest.mark.parametrize("name", _LATIN)
@pytest.mark.parametrize("declared", [[], ["ISO_IR 192"]])
def test_an_undeclared_latin_name_is_flagged(name: str, declared: list[str]) -> None:
    decoded = decode_text(name.encode("latin-1"), declared)
    assert (decoded.text, decoded.is_doubtful) == (name, True)


@pytest.mark.parametrize("name", [name for name in _LATIN if name != "Å^Ö"])
@pytest.mark.parametrize("declared", [[], ["ISO_IR 100"], ["ISO_IR 192"]])
def test_a_latin_name_in_utf8(name: str, declared: list[str]) -> None:
    decoded = decode_text(name.encode("utf-8"), declared)
    assert (decoded.text, decoded.is_doubtful) == (name, False)


@pytest.mark.parametrize("text", ["胸部正位片", "DR胸部正侧位", "胸部PA", "左手正斜位", "胸部（正位）", "急诊、床旁"])
@pytest.mark.parametrize("declared", [[], ["ISO_IR 100"], ["ISO_IR 192"]])
def test_a_description_in_gbk(text: str, declared: list[str]) -> None:
    assert decode_text(text.encode("gbk"), declared).text == text


def test_code_extensions_as_the_standard_prints_them() -> None:
    """PS3.5 K.2 (Chinese, GB 2312), H.3.1 (Japanese) and I.2 (Korean)."""
    chinese = b"Zhang^XiaoDong=\x1b$)A\xd5\xc5^\x1b$)A\xd0\xa1\xb6\xab= "
    assert decode_text(chinese, ["", "ISO 2022 IR 58"]).text == "Zhang^XiaoDong=张^小东="
    japanese = b"Yamada^Tarou=\x1b$B;3ED\x1b(B^\x1b$BB@O:\x1b(B=\x1b$B$d$^$@\x1b(B^\x1b$B$?$m$&\x1b(B"
    assert decode_text(japanese, ["", "ISO 2022 IR 87"]).text == "Yamada^Tarou=山田^太郎=やまだ^たろう"
    korean = b"Hong^Gildong=\x1b$)C\xfb\xf3^\x1b$)C\xd1\xce\xd4\xd7=\x1b$)C\xc8\xab^\x1b$)C\xb1\xe6\xb5\xbf"
    assert decode_text(korean, ["", "ISO 2022 IR 149"]).text == "Hong^Gildong=洪^吉洞=홍^길동"


@pytest.mark.parametrize("declared", [["GB18030"], ["ISO 2022 GBK"], ["ISO_IR 100"], []])
def test_an_escape_sequence_without_its_declaration(declared: list[str]) -> None:
    assert decode_text(b"\x1b$)A\xd5\xc5^\x1b$)A\xd0\xa1\xb6\xab", declared).text == "张^小东"


@pytest.mark.parametrize("declared", ["ISO_IR 144", "ISO_IR 101", "ISO_IR 126"])
def test_other_declared_sets_stay(declared: str) -> None:
    text = {"ISO_IR 144": "Люкceмбypг", "ISO_IR 101": "Wałęsa^Łukasz", "ISO_IR 126": "Διονυσιος"}[declared]
    codec = {"ISO_IR 144": "iso8859_5", "ISO_IR 101": "iso8859_2", "ISO_IR 126": "iso8859_7"}[declared]
    assert decode_text(text.encode(codec), [declared]).text == text


def test_big5_is_flagged_and_not_guessed() -> None:
    assert decode_text("陳^美玲".encode("big5"), []).is_doubtful


@given(
    st.binary(max_size=64),
    st.lists(st.sampled_from(["", "ISO_IR 100", "ISO_IR 192", "GB18030", "ISO 2022 IR 58", "nonsense", "ISO_IR 144"]), max_size=3),
)
def test_any_bytes_decode(raw: bytes, declared: list[str]) -> None:
    assert isinstance(decode_text(raw, declared).text, str)

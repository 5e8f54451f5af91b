"""The words that senders use for body part, view and species, as defined terms of DICOM.

Body Part Examined and View Position should hold defined terms (PS3.16 Annex L, PS3.3 C.8.11.5.1.1). Real senders write ``CHEST PA``,
``CHEST_1_VIEW``, ``TORAX`` or ``胸部正位``. Pure functions; a word that is not in the tables means nothing.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache
from typing import Final

# Defined term -> words of other senders, in capitals and without accents; Chinese words are found inside a text, Latin ones as words.
_BODY_PARTS: Final[dict[str, str]] = {
    "CHEST": "CHEST THORAX TORAX THORAXX THORACIC THORACICA TORACE BRUSTKORB POITRINE PECHO PEITO LUNG LUNGS CXR 胸部 胸片 胸腔 肺 胸",
    "RIB": "RIB RIBS COSTILLAS RIPPEN 肋骨",
    "HAND": "HAND HANDS MANO MAO 手",
    "WRIST": "WRIST CARPUS HANDGELENK MUNECA POIGNET 腕",
    "FINGER": "FINGER FINGERS THUMB DEDO 指",
    "ELBOW": "ELBOW ELLBOGEN CODO COUDE 肘",
    "FOREARM": "FOREARM UNTERARM RADIUS ULNA 前臂 尺桡骨",
    "HUMERUS": "HUMERUS UPPERARM OBERARM 肱骨 上臂",
    "SHOULDER": "SHOULDER SCHULTER HOMBRO EPAULE OMBRO 肩",
    "CLAVICLE": "CLAVICLE CLAVICULA 锁骨",
    "KNEE": "KNEE KNEES KNIE RODILLA GENOU JOELHO PATELLA 膝 髌骨",
    "LEG": "LEG TIBIA FIBULA TIBFIB CALF UNTERSCHENKEL 小腿 胫腓骨",
    "ANKLE": "ANKLE SPRUNGGELENK TOBILLO CHEVILLE 踝",
    "FOOT": "FOOT FEET FUSS PIE PIED CALCANEUS HEEL TOE TOES 足 跟骨 趾",
    "FEMUR": "FEMUR THIGH OBERSCHENKEL 股骨 大腿",
    "HIP": "HIP HIPS HUEFTE CADERA HANCHE 髋",
    "PELVIS": "PELVIS BECKEN BASSIN 骨盆",
    "ABDOMEN": "ABDOMEN ABDOMINAL KUB BELLY BAUCH VENTRE 腹",
    "SKULL": "SKULL SCHAEDEL CRANEO CRANE CRANIO SINUS SINUSES ORBIT FACIAL 颅 鼻窦 副鼻窦",
    "HEAD": "HEAD BRAIN CEREBRAL KOPF CABEZA TETE 头 脑",
    "NECK": "NECK HALS CUELLO 颈部",
    "CSPINE": "CSPINE CERVICAL HWS 颈椎",
    "TSPINE": "TSPINE BWS 胸椎",
    "LSPINE": "LSPINE LUMBAR LWS LUMBOSACRAL 腰椎",
    "SPINE": "SPINE COLUMNA RACHIS WIRBELSAEULE 脊柱",
    "BREAST": "BREAST MAMMOGRAPHY MAMMA MAMOGRAFIA 乳腺 乳房",
    "JAW": "JAW MANDIBLE MAXILLA TEETH DENTAL 颌 牙",
}  # fmt: skip
# Defined terms of PS3.16 Annex L that name several parts.
_COMPOUNDS: Final[dict[str, frozenset[str]]] = {
    "CHESTABDOMEN": frozenset({"CHEST", "ABDOMEN"}),
    "CHESTABDPELVIS": frozenset({"CHEST", "ABDOMEN", "PELVIS"}),
    "ABDOMENPELVIS": frozenset({"ABDOMEN", "PELVIS"}),
    "NECKCHEST": frozenset({"NECK", "CHEST"}),
    "HEADNECK": frozenset({"HEAD", "NECK"}),
}
# Chinese words that contain the word of a body part and name none: operation, manoeuvre, indication, born at term.
_NO_PARTS: Final = ("手术", "手法", "指示", "足月")
# Longer Chinese words first: 胸椎 (thoracic spine) is not 胸 (chest), 颈椎 is not 颈部.
_CHINESE_PARTS: Final = sorted(
    ((word, part) for part, words in _BODY_PARTS.items() for word in words.split() if not word.isascii()), key=lambda pair: -len(pair[0])
)
_LATIN_PARTS: Final = {word: part for part, words in _BODY_PARTS.items() for word in words.split() if word.isascii()}

FRONTAL: Final = "FRONTAL"
LATERAL: Final = "LATERAL"
OBLIQUE: Final = "OBLIQUE"
_LATIN_VIEWS: Final[dict[str, str]] = {
    word: view
    for view, words in {
        "PA": "PA POSTEROANTERIOR POSTEROANT DV",
        "AP": "AP ANTEROPOSTERIOR ANTEROPOST",
        FRONTAL: "FRONTAL FRONT FRONTALE",
        "LL": "LL LLAT LLATERAL",
        "RL": "RL RLAT RLATERAL",
        LATERAL: "LAT LATERAL SEITL SEITLICH PROFIL PERFIL LATERALE LATEROLATERAL LATERO",
        OBLIQUE: "OBLIQUE OBL LAO RAO LPO RPO OBLIQUA",
        "LORDOTIC": "LORDOTIC",
        "DECUBITUS": "DECUBITUS LLD RLD",
    }.items()
    for word in words.split()
}
_CHINESE_VIEWS: Final = (
    ("正侧位", ""), ("正斜位", ""), ("左侧位", "LL"), ("右侧位", "RL"), ("侧位", LATERAL), ("側位", LATERAL), ("斜位", OBLIQUE),
    ("后前位", "PA"), ("後前位", "PA"), ("前后位", "AP"), ("前後位", "AP"), ("正位", FRONTAL), ("卧位", ""), ("立位", ""),
)  # fmt: skip
_HUMAN: Final = ("", "HUMAN", "HOMO SAPIENS", "MAN", "人", "人类")
# SNOMED CT, its former identifiers (SRT) and its concept of 2023 for the organism "Homo sapiens" (CID 7454 lists animals only).
_HUMAN_CODES: Final = ("337915000", "L-85B00", "278412004")


def words_of(text: str) -> tuple[str, ...]:
    """The Latin words of a text in capitals, without accents, underscores and digits; ``postero-anterior`` is one word."""
    plain = unicodedata.normalize("NFKD", text.upper().replace("ß", "SS"))
    plain = "".join(char for char in plain if not unicodedata.combining(char))
    plain = re.sub(r"(POSTERO|ANTERO|LATERO|[CTL])[-_ .](ANTERIOR|POSTERIOR|LATERAL|SPINE)", r"\1\2", plain)
    return tuple(re.findall(r"[A-Z]+", plain))


def body_parts_of(text: str) -> frozenset[str]:
    """The body parts that a text names, as defined terms; empty: none that is known.

    >>> sorted(body_parts_of("CHEST_1_VIEW")), sorted(body_parts_of("左手正斜位")), sorted(body_parts_of("胸椎"))
    (['CHEST'], ['HAND'], ['TSPINE'])
    """
    words = words_of(text)
    parts = {_LATIN_PARTS[word] for word in words if word in _LATIN_PARTS}.union(*(_COMPOUNDS.get(word, ()) for word in words))
    rest = unicodedata.normalize("NFKC", text)
    for word in _NO_PARTS:
        rest = rest.replace(word, " ")
    for word, part in _CHINESE_PARTS:
        if word in rest:
            parts.add(part)
            rest = rest.replace(word, " ")
    return frozenset(parts)


@lru_cache(maxsize=1024)
def view_of(text: str) -> str:
    """The view that a text names: PA, AP, LL, RL, FRONTAL, LATERAL, OBLIQUE, LORDOTIC or DECUBITUS; empty: none, or several.

    FRONTAL is PA or AP without saying which; a view of the side or an oblique one outranks it (``PA OBLIQUE``).

    >>> view_of("AP SUPINE"), view_of("胸部正位"), view_of("胸部侧位"), view_of("PA LAT")
    ('AP', 'FRONTAL', 'LATERAL', '')
    """
    views = {_LATIN_VIEWS[word] for word in words_of(text) if word in _LATIN_VIEWS}
    rest = unicodedata.normalize("NFKC", text)
    for word, view in _CHINESE_VIEWS:
        if word in rest:
            if not view and word.startswith("正"):
                return ""
            views |= {view} - {""}
            rest = rest.replace(word, " ")
    frontal, others = views & {"PA", "AP", FRONTAL}, views - {"PA", "AP", FRONTAL}
    if frontal and others & {"LL", "RL", LATERAL}:
        return ""
    if len(others) > 1:
        others -= {LATERAL}
    if len(frontal) > 1:
        frontal -= {FRONTAL}
    chosen = others or frontal
    return next(iter(chosen)) if len(chosen) == 1 else ""


def is_human(description: str, code: str = "") -> bool:
    """Whether Patient Species Description (0010,2201) or the code of its sequence (0010,2202) is a human's; absent counts as human."""
    if code in _HUMAN_CODES:
        return True
    return not code and " ".join(description.upper().split()) in _HUMAN

"""The model card of the reference bundle, in Chinese and English; its other texts stand in ``draft.toml``."""

from __future__ import annotations

from collections.abc import Sequence

from model_sync.bundle import OperatingPoint, SourceMeasure
from quantize.bundle.model_card import interval, table

_CARD = """\
# cxr-pneumonia {version}

**仅供演示，不是医疗器械，不得用于临床。不得单独作为诊断依据。**
**Demonstration only. Not a medical device, not for clinical use, not for sole diagnosis.**

## 中文

**用途**　在正位胸片（PA、AP）上给出肺炎的概率，并以类激活图指出依据所在。只有一个标签：肺炎（SNOMED CT 233604007）。

**模型**　紧凑型残差网络，340 万参数，全局平均池化加一层线性层，输入 1×224×224。训练方法见 `quantize/reference/train.py`。

**训练数据**　6,769 张公开胸片：Kermany 2018（1–5 岁儿童）5,627 张，NIH ChestX-ray14（多为成人）873 张，汉诺威 185 张，ieee8023 84 张。

**工作点**　阈值 {threshold}：取留出患者中灵敏度不低于 0.95 的最高阈值。灵敏度 {sensitivity}，特异度 {specificity}（95% Wilson 区间）。
阈值在同一批影像上选取，因此总灵敏度略偏乐观；同一患者的多张影像按独立计算，区间略偏窄。
留出影像中有 1 张与训练影像几乎相同（同一病例见于两个来源）。AUC 只应在同一来源内比较。

**局限**
- 训练影像以 1–5 岁儿童为主。成人的灵敏度和特异度明显较低，见下表 NIH 一行。
- 不识别结核、气胸、肿块、骨折等任何其他病变。得分低不代表胸片正常。
- 侧位片、非胸部影像不适用。翻拍胶片未单独验证。
- 汉诺威与 ieee8023 几乎没有阴性影像，其特异度无法给出。

## English

**Use**　Gives the probability of pneumonia on a frontal chest X-ray (PA, AP) and a class activation map that shows where it
comes from. One label only: pneumonia (SNOMED CT 233604007).

**Model**　Compact residual network, 3.4 million parameters, global average pooling and one linear layer, input 1x224x224.
The recipe is `quantize/reference/train.py`.

**Training data**　6,769 public pictures: Kermany 2018 (children aged 1 to 5) 5,627, NIH ChestX-ray14 (mostly adults) 873,
Hannover 185, ieee8023 84. The licence of the ieee8023 pictures differs per picture; some allow non-commercial use only.

**Operating point**　Threshold {threshold}: the highest one that finds at least 0.95 of the positives among the held-out
patients. Sensitivity {sensitivity}, specificity {specificity} (95 % Wilson intervals). The threshold was chosen on the same
pictures, so the overall sensitivity is slightly optimistic; several pictures of one patient are counted as independent, so
the intervals are slightly narrow. One of the held-out pictures is nearly the same as a training picture (one case that
appears in two sources). Compare an AUC only within one source.

**Limits**
- Most training pictures are of children aged 1 to 5. For adults sensitivity and specificity are clearly lower: see NIH below.
- It does not recognise tuberculosis, pneumothorax, masses, fractures or anything else. A low score is not a normal chest.
- Lateral views and other body parts are out of scope. Photographed films were not validated by themselves.
- Hannover and ieee8023 hold next to no negative pictures, so no specificity can be given for them.

## 留出患者 / Held-out patients ({n_held_out})

{held_out}

## 独立影像 / Independent pictures ({n_independent})

患者未参与训练和选阈值。These patients took no part in training or in choosing the threshold.

{independent}

{gate}

## 许可 / Licence

权重 / weights: Apache-2.0. 训练影像的许可见上文 / for the training pictures see above.
"""


def card(version: str, point: OperatingPoint, independent: Sequence[SourceMeasure], gate: str) -> str:
    """Return ``MODEL_CARD.md``; ``gate`` is the chapter on the variants."""
    return _CARD.format(
        version=version,
        threshold=f"{point.threshold:.4f}",
        sensitivity=interval(point.sensitivity),
        specificity=interval(point.specificity),
        n_held_out=_size(point.per_source),
        held_out=table(point.per_source),
        n_independent=_size(independent),
        independent=table(independent),
        gate=gate,
    )


def _size(measures: Sequence[SourceMeasure]) -> int:
    return sum(measure.n_positive + measure.n_negative for measure in measures)

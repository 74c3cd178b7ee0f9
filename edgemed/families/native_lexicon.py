"""What the native family can name in English and Chinese: structures, modalities, body parts; and what it must refuse.

Covers the names, and words for where a box lies; how a question or an answer is worded is in `training`. The
order of STRUCTURES, MODALITIES and BODY_PARTS is the index used in the graphs and in checkpoints: append, never
reorder. GROUPS and UNKNOWN_NAMES carry no index.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from edgemed.core import Language
from edgemed.geometry import BINS


@dataclass(frozen=True)
class Term:
    """One thing with its names. `key` is stable and goes into files; answers use the first name of a language."""

    key: str
    en: tuple[str, ...]
    zh: tuple[str, ...]


STRUCTURES: tuple[Term, ...] = (
    Term("liver", ("liver",), ("肝脏", "肝")),
    Term("spleen", ("spleen",), ("脾脏", "脾")),
    Term("stomach", ("stomach",), ("胃", "胃部")),
    Term("aorta", ("aorta",), ("主动脉", "大动脉")),
    Term("inferior_vena_cava", ("inferior vena cava", "IVC", "vena cava inferior"), ("下腔静脉",)),
    Term(
        "portal_vein",
        ("portal vein", "portal and splenic vein", "portal venous system"),
        ("门静脉", "门脉", "门静脉和脾静脉"),
    ),
    Term("pancreas", ("pancreas",), ("胰腺", "胰脏", "胰")),
    Term(
        "adrenal_gland_right",
        ("right adrenal gland", "right adrenal", "right suprarenal gland"),
        ("右肾上腺", "右侧肾上腺"),
    ),
    Term(
        "adrenal_gland_left",
        ("left adrenal gland", "left adrenal", "left suprarenal gland"),
        ("左肾上腺", "左侧肾上腺"),
    ),
    Term("kidney_right", ("right kidney",), ("右肾", "右侧肾脏", "右肾脏", "右侧肾")),
    Term("kidney_left", ("left kidney",), ("左肾", "左侧肾脏", "左肾脏", "左侧肾")),
    Term("gallbladder", ("gallbladder", "gall bladder"), ("胆囊",)),
    Term("duodenum", ("duodenum",), ("十二指肠",)),
    Term("small_bowel", ("small bowel", "small intestine", "small bowel loops"), ("小肠", "小肠肠管")),
    Term("colon", ("colon", "large bowel", "large intestine"), ("结肠", "大肠")),
    Term("urinary_bladder", ("urinary bladder", "bladder"), ("膀胱",)),
    Term("prostate", ("prostate", "prostate gland"), ("前列腺",)),
    Term("lung_right", ("right lung",), ("右肺", "右侧肺", "右侧肺部")),
    Term("lung_left", ("left lung",), ("左肺", "左侧肺", "左侧肺部")),
    Term("heart", ("heart",), ("心脏", "心")),
    Term("pulmonary_artery", ("pulmonary artery", "pulmonary trunk"), ("肺动脉", "肺动脉干")),
    Term(
        "vertebra",
        ("vertebrae", "vertebra", "vertebral body", "spine", "backbone", "spinal column"),
        ("椎骨", "椎体", "脊柱", "脊椎"),
    ),
    Term("sacrum", ("sacrum", "sacral bone"), ("骶骨",)),
    Term("spinal_cord", ("spinal cord", "cord"), ("脊髓",)),
    Term("ribs", ("ribs", "rib"), ("肋骨",)),
    Term("costal_cartilages", ("costal cartilages", "costal cartilage"), ("肋软骨",)),
    Term("hip_right", ("right hip bone", "right hip"), ("右髋骨", "右侧髋骨", "右髋")),
    Term("hip_left", ("left hip bone", "left hip"), ("左髋骨", "左侧髋骨", "左髋")),
    Term("femur_right", ("right femur", "right thigh bone"), ("右股骨", "右侧股骨")),
    Term("femur_left", ("left femur", "left thigh bone"), ("左股骨", "左侧股骨")),
    Term(
        "back_muscle_right",
        ("right deep back muscles", "right autochthonous muscles", "right erector spinae"),
        ("右侧竖脊肌", "右竖脊肌", "右背部深层肌"),
    ),
    Term(
        "back_muscle_left",
        ("left deep back muscles", "left autochthonous muscles", "left erector spinae"),
        ("左侧竖脊肌", "左竖脊肌", "左背部深层肌"),
    ),
    Term("iliopsoas_right", ("right iliopsoas muscle", "right iliopsoas"), ("右髂腰肌", "右侧髂腰肌")),
    Term("iliopsoas_left", ("left iliopsoas muscle", "left iliopsoas"), ("左髂腰肌", "左侧髂腰肌")),
    Term("gluteal_muscle_right", ("right gluteal muscles", "right gluteus"), ("右臀肌", "右侧臀肌")),
    Term("gluteal_muscle_left", ("left gluteal muscles", "left gluteus"), ("左臀肌", "左侧臀肌")),
    Term("iliac_vessels", ("iliac vessels", "iliac arteries and veins", "iliac vessel"), ("髂血管",)),
    Term("brain", ("brain",), ("大脑", "脑", "脑组织")),
    Term("grey_matter", ("grey matter", "gray matter"), ("灰质", "脑灰质")),
    Term("white_matter", ("white matter",), ("白质", "脑白质")),
    Term("brain_tumour", ("brain tumour", "brain tumor"), ("脑肿瘤", "脑瘤")),
    Term("polyp", ("polyp", "colon polyp", "polyps"), ("息肉", "肠息肉")),
    Term(
        "retinal_vessels",
        ("retinal vessels", "retinal blood vessels", "retinal vasculature"),
        ("视网膜血管", "眼底血管"),
    ),
    Term("white_blood_cell", ("white blood cell", "leukocyte", "white blood cells"), ("白细胞", "白血球")),
)

MODALITIES: tuple[Term, ...] = (
    Term("ct", ("CT",), ("CT",)),
    Term("mr", ("MR", "MRI", "magnetic resonance"), ("磁共振", "MRI", "核磁共振")),
    Term("xray", ("X-ray", "radiograph"), ("X线", "X光")),
    Term("ultrasound", ("ultrasound",), ("超声",)),
    Term("fundus", ("fundus photograph", "fundus"), ("眼底照相", "眼底图像")),
    Term("dermoscopy", ("dermoscopy",), ("皮肤镜",)),
    Term("endoscopy", ("endoscopy",), ("内镜", "内窥镜")),
    Term("histopathology", ("histopathology",), ("组织病理",)),
    Term("microscopy", ("blood smear microscopy",), ("血涂片显微镜",)),
)

BODY_PARTS: tuple[Term, ...] = (
    Term("abdomen", ("abdomen",), ("腹部",)),
    Term("chest", ("chest",), ("胸部",)),
    Term("pelvis", ("pelvis",), ("盆腔",)),
    Term("head", ("head",), ("头部",)),
    Term("heart", ("heart",), ("心脏",)),
    Term("retina", ("retina",), ("视网膜",)),
    Term("skin", ("skin",), ("皮肤",)),
    Term("bowel", ("bowel",), ("肠道",)),
    Term("blood", ("blood",), ("血液",)),
    Term("breast_tissue", ("breast tissue",), ("乳腺组织",)),
    Term("limb", ("limb",), ("四肢",)),
    Term("body", ("body",), ("身体",)),
)

EN_PLURAL: frozenset[str] = frozenset(
    {
        "vertebra",
        "ribs",
        "costal_cartilages",
        "back_muscle_right",
        "back_muscle_left",
        "gluteal_muscle_right",
        "gluteal_muscle_left",
        "iliac_vessels",
        "retinal_vessels",
    }
)
"""Keys of the structures whose first English name takes "are"."""


@dataclass(frozen=True)
class Group:
    """A name for several structures at once; `members` are indices into STRUCTURES in the order they are answered."""

    en: tuple[str, ...]
    zh: tuple[str, ...]
    members: tuple[int, ...]


def _index(key: str) -> int:
    return next(i for i, term in enumerate(STRUCTURES) if term.key == key)


def _pair(stem: str, en: tuple[str, ...], zh: tuple[str, ...]) -> Group:
    return Group(en, zh, (_index(f"{stem}_right"), _index(f"{stem}_left")))


GROUPS: tuple[Group, ...] = (
    _pair("adrenal_gland", ("adrenal glands", "adrenal gland", "adrenals"), ("肾上腺", "双侧肾上腺")),
    _pair("kidney", ("kidneys", "kidney", "both kidneys"), ("肾脏", "肾", "双肾")),
    _pair("lung", ("lungs", "lung", "both lungs"), ("肺", "双肺", "肺部")),
    _pair("hip", ("hip bones", "hip bone", "hips"), ("髋骨", "双侧髋骨")),
    _pair("femur", ("femurs", "femur", "thigh bones"), ("股骨", "双侧股骨")),
    _pair("back_muscle", ("deep back muscles", "autochthonous muscles", "erector spinae"), ("竖脊肌", "背部深层肌")),
    _pair("iliopsoas", ("iliopsoas muscles", "iliopsoas", "iliopsoas muscle"), ("髂腰肌", "双侧髂腰肌")),
    _pair("gluteal_muscle", ("gluteal muscles", "gluteus", "glutei"), ("臀肌", "双侧臀肌")),
)


def structure_of(name: str) -> int | None:
    """Return the index of the structure that `name` is a name of, or None; either language, any letter case.

    >>> structure_of("Bladder"), structure_of("the liver"), structure_of("肝"), structure_of("appendix")
    (15, 0, 0, None)
    """
    return _BY_NAME.get(name.strip().lower().removeprefix("the ").strip())


_BY_NAME: dict[str, int] = {
    name.lower(): index for index, term in enumerate(STRUCTURES) for name in (*term.en, *term.zh)
}

UNKNOWN_NAMES: tuple[Term, ...] = (
    Term("hippocampus", ("hippocampus", "hippocampi", "hippocampal formation"), ("海马", "海马体")),
    Term("thyroid", ("thyroid", "thyroid gland"), ("甲状腺",)),
    Term("parathyroid_gland", ("parathyroid gland", "parathyroids"), ("甲状旁腺",)),
    Term("uterus", ("uterus", "womb"), ("子宫",)),
    Term("cervix", ("cervix", "uterine cervix"), ("宫颈", "子宫颈")),
    Term("ovary", ("ovary", "ovaries", "left ovary", "right ovary"), ("卵巢", "左侧卵巢")),
    Term("fallopian_tube", ("fallopian tube",), ("输卵管",)),
    Term("vagina", ("vagina",), ("阴道",)),
    Term("testis", ("testis", "testicle", "testes"), ("睾丸",)),
    Term("penis", ("penis",), ("阴茎",)),
    Term("seminal_vesicle", ("seminal vesicle", "seminal vesicles"), ("精囊", "精囊腺")),
    Term("appendix", ("appendix", "vermiform appendix"), ("阑尾",)),
    Term("oesophagus", ("oesophagus", "esophagus", "gullet"), ("食管", "食道")),
    Term("trachea", ("trachea", "windpipe"), ("气管",)),
    Term("bronchus", ("bronchus", "bronchi", "main bronchus"), ("支气管", "主支气管")),
    Term("larynx", ("larynx",), ("喉", "喉部")),
    Term("pharynx", ("pharynx", "throat"), ("咽", "咽部")),
    Term("tongue", ("tongue",), ("舌", "舌头")),
    Term("tonsil", ("tonsil", "tonsils"), ("扁桃体",)),
    Term("tooth", ("tooth", "teeth"), ("牙齿", "牙")),
    Term("parotid_gland", ("parotid gland", "parotids"), ("腮腺",)),
    Term("submandibular_gland", ("submandibular gland",), ("颌下腺",)),
    Term("mandible", ("mandible", "lower jaw", "jaw"), ("下颌骨", "下颌")),
    Term("maxilla", ("maxilla", "upper jaw"), ("上颌骨",)),
    Term("skull", ("skull", "cranium"), ("颅骨", "头骨")),
    Term("cerebellum", ("cerebellum",), ("小脑",)),
    Term("brainstem", ("brainstem", "brain stem"), ("脑干",)),
    Term("pons", ("pons",), ("脑桥",)),
    Term("medulla_oblongata", ("medulla oblongata", "medulla"), ("延髓",)),
    Term("thalamus", ("thalamus",), ("丘脑",)),
    Term("hypothalamus", ("hypothalamus",), ("下丘脑",)),
    Term("amygdala", ("amygdala",), ("杏仁核",)),
    Term("caudate_nucleus", ("caudate nucleus", "caudate"), ("尾状核",)),
    Term("putamen", ("putamen",), ("壳核",)),
    Term("corpus_callosum", ("corpus callosum",), ("胼胝体",)),
    Term("pituitary_gland", ("pituitary gland", "pituitary", "hypophysis"), ("垂体", "脑垂体")),
    Term("pineal_gland", ("pineal gland",), ("松果体",)),
    Term(
        "cerebral_ventricle",
        ("cerebral ventricle", "lateral ventricle", "ventricles of the brain", "third ventricle"),
        ("脑室", "侧脑室"),
    ),
    Term("cerebrospinal_fluid", ("cerebrospinal fluid", "CSF"), ("脑脊液",)),
    Term("basal_ganglia", ("basal ganglia",), ("基底节",)),
    Term("frontal_lobe", ("frontal lobe",), ("额叶",)),
    Term("temporal_lobe", ("temporal lobe",), ("颞叶",)),
    Term("occipital_lobe", ("occipital lobe",), ("枕叶",)),
    Term("eyeball", ("eyeball", "eye", "eyes", "globe"), ("眼球", "眼睛")),
    Term("optic_nerve", ("optic nerve",), ("视神经",)),
    Term("optic_disc", ("optic disc", "optic disk", "optic cup"), ("视盘", "视杯")),
    Term("macula", ("macula", "fovea"), ("黄斑", "中央凹")),
    Term("lens", ("lens", "crystalline lens"), ("晶状体",)),
    Term("cornea", ("cornea",), ("角膜",)),
    Term("inner_ear", ("inner ear", "cochlea", "ear"), ("内耳", "耳蜗", "耳朵")),
    Term("nose", ("nose", "nasal cavity"), ("鼻子", "鼻腔")),
    Term("maxillary_sinus", ("maxillary sinus", "paranasal sinuses", "sinus"), ("上颌窦", "鼻窦")),
    Term("carotid_artery", ("carotid artery", "carotids", "internal carotid artery"), ("颈动脉", "颈内动脉")),
    Term("jugular_vein", ("jugular vein",), ("颈静脉",)),
    Term("subclavian_artery", ("subclavian artery",), ("锁骨下动脉",)),
    Term("superior_vena_cava", ("superior vena cava", "SVC"), ("上腔静脉",)),
    Term("hepatic_vein", ("hepatic vein", "hepatic veins"), ("肝静脉",)),
    Term("hepatic_artery", ("hepatic artery",), ("肝动脉",)),
    Term("splenic_artery", ("splenic artery",), ("脾动脉",)),
    Term("renal_artery", ("renal artery", "renal arteries"), ("肾动脉",)),
    Term("renal_vein", ("renal vein",), ("肾静脉",)),
    Term("renal_pelvis", ("renal pelvis",), ("肾盂",)),
    Term(
        "mesenteric_artery", ("mesenteric artery", "superior mesenteric artery", "SMA"), ("肠系膜动脉", "肠系膜上动脉")
    ),
    Term("coronary_artery", ("coronary artery", "coronaries"), ("冠状动脉",)),
    Term("femoral_artery", ("femoral artery",), ("股动脉",)),
    Term("bile_duct", ("bile duct", "common bile duct", "CBD"), ("胆管", "胆总管")),
    Term("pancreatic_duct", ("pancreatic duct",), ("胰管",)),
    Term("ureter", ("ureter", "ureters", "left ureter", "right ureter"), ("输尿管", "左侧输尿管")),
    Term("urethra", ("urethra",), ("尿道",)),
    Term("rectum", ("rectum",), ("直肠",)),
    Term("anus", ("anus", "anal canal"), ("肛门", "肛管")),
    Term("caecum", ("caecum", "cecum"), ("盲肠",)),
    Term("sigmoid", ("sigmoid",), ("乙状结肠",)),
    Term("omentum", ("omentum",), ("大网膜",)),
    Term("peritoneum", ("peritoneum",), ("腹膜",)),
    Term("diaphragm", ("diaphragm",), ("膈肌", "横膈")),
    Term("pleura", ("pleura",), ("胸膜",)),
    Term("pericardium", ("pericardium",), ("心包",)),
    Term("mediastinum", ("mediastinum",), ("纵隔",)),
    Term("left_ventricle", ("left ventricle", "LV", "right ventricle"), ("左心室", "右心室")),
    Term("left_atrium", ("left atrium", "right atrium"), ("左心房", "右心房")),
    Term("mitral_valve", ("mitral valve", "heart valve", "aortic valve"), ("二尖瓣", "心脏瓣膜")),
    Term("myocardium", ("myocardium",), ("心肌",)),
    Term("thymus", ("thymus",), ("胸腺",)),
    Term("lymph_node", ("lymph node", "lymph nodes"), ("淋巴结",)),
    Term("breast", ("breast", "breasts", "mammary gland"), ("乳房", "乳腺")),
    Term("nipple", ("nipple",), ("乳头",)),
    Term("clavicle", ("clavicle", "collarbone", "left clavicle"), ("锁骨", "左锁骨")),
    Term("scapula", ("scapula", "shoulder blade", "right scapula"), ("肩胛骨", "右肩胛骨")),
    Term("sternum", ("sternum", "breastbone"), ("胸骨",)),
    Term("humerus", ("humerus", "left humerus"), ("肱骨", "左肱骨")),
    Term("radius", ("radius",), ("桡骨",)),
    Term("ulna", ("ulna",), ("尺骨",)),
    Term("wrist", ("wrist", "carpal bones"), ("手腕", "腕骨")),
    Term("hand", ("hand", "finger", "fingers"), ("手", "手指")),
    Term("tibia", ("tibia", "shin bone"), ("胫骨",)),
    Term("fibula", ("fibula",), ("腓骨",)),
    Term("patella", ("patella", "kneecap", "knee"), ("髌骨", "膝关节")),
    Term("foot", ("foot", "ankle", "toe"), ("足", "踝关节", "脚趾")),
    Term("meniscus", ("meniscus",), ("半月板",)),
    Term("cruciate_ligament", ("cruciate ligament", "ACL"), ("交叉韧带",)),
    Term("achilles_tendon", ("Achilles tendon",), ("跟腱",)),
    Term("intervertebral_disc", ("intervertebral disc", "disc", "discs"), ("椎间盘",)),
    Term("coccyx", ("coccyx", "tailbone"), ("尾骨",)),
    Term("pubic_symphysis", ("pubic symphysis",), ("耻骨联合",)),
    Term("psoas_abscess", ("psoas abscess",), ("腰大肌脓肿",)),
    Term("quadriceps", ("quadriceps", "thigh muscle"), ("股四头肌",)),
    Term("biceps", ("biceps",), ("肱二头肌",)),
    Term("red_blood_cell", ("red blood cell", "red blood cells", "erythrocyte"), ("红细胞",)),
    Term("platelet", ("platelet", "platelets"), ("血小板",)),
    Term("cell_nucleus", ("cell nucleus", "nuclei"), ("细胞核",)),
    Term("mole", ("mole", "naevus"), ("痣", "色素痣")),
    Term("melanoma", ("melanoma",), ("黑色素瘤",)),
    Term("hair_follicle", ("hair follicle", "hair"), ("毛囊", "毛发")),
    Term("kidney_stone", ("kidney stone", "renal stone"), ("肾结石",)),
    Term("gallstone", ("gallstone", "gallstones"), ("胆结石",)),
    Term("lung_nodule", ("lung nodule", "pulmonary nodule"), ("肺结节",)),
    Term("liver_cyst", ("liver cyst", "hepatic cyst"), ("肝囊肿",)),
    Term("renal_cyst", ("renal cyst", "kidney cyst"), ("肾囊肿",)),
    Term("liver_metastasis", ("liver metastasis", "liver metastases"), ("肝转移瘤",)),
    Term("haematoma", ("haematoma", "hematoma"), ("血肿",)),
    Term("pleural_effusion", ("pleural effusion", "effusion"), ("胸腔积液", "积液")),
    Term("ascites", ("ascites",), ("腹水",)),
    Term("pneumothorax", ("pneumothorax",), ("气胸",)),
    Term("aneurysm", ("aneurysm", "aortic aneurysm"), ("动脉瘤", "主动脉瘤")),
    Term("fracture", ("fracture", "rib fracture"), ("骨折", "肋骨骨折")),
    Term("hernia", ("hernia", "hiatal hernia"), ("疝", "食管裂孔疝")),
    Term("catheter", ("catheter", "tube"), ("导管",)),
    Term("pacemaker", ("pacemaker",), ("起搏器",)),
    Term("placenta", ("placenta",), ("胎盘",)),
    Term("fetus", ("fetus", "foetus"), ("胎儿",)),
    Term("umbilical_cord", ("umbilical cord",), ("脐带",)),
    Term("amniotic_fluid", ("amniotic fluid",), ("羊水",)),
)
"""Names a user may ask for that are not among STRUCTURES. The model learns to say so; the order means nothing."""


def _spelling(name: str) -> str:
    """Return the pattern of a name in running text: a Latin one as a word of its own, singular or plural."""
    return rf"\b{re.escape(name.lower())}s?\b" if name.isascii() else re.escape(name)


_MEANING: dict[str, tuple[int, ...]] = {
    **{name.lower(): () for term in UNKNOWN_NAMES for name in (*term.en, *term.zh)},
    **{name.lower(): group.members for group in GROUPS for name in (*group.en, *group.zh)},
    **{name: (index,) for name, index in _BY_NAME.items()},
}
_ANY_NAME = re.compile("|".join(f"({_spelling(name)})" for name in sorted(_MEANING, key=len, reverse=True)))
_MEANINGS = tuple(_MEANING[name] for name in sorted(_MEANING, key=len, reverse=True))


_GRID: dict[Language, tuple[tuple[str, str, str], ...]] = {
    "en": (
        ("upper left", "upper central", "upper right"),
        ("left", "central", "right"),
        ("lower left", "lower central", "lower right"),
    ),
    "zh": (("左上部", "上部", "右上部"), ("左部", "中央", "右部"), ("左下部", "下部", "右下部")),
}


def position(bins: tuple[int, int, int, int], language: Language, extent: tuple[int, int] = (BINS, BINS)) -> str:
    """Return where the centre of the box lies on a 3 x 3 grid over the image, in words.

    >>> position((0, 0, 200, 200), "en"), position((400, 800, 600, 900), "zh")
    ('upper left', '下部')
    """
    column = min(3 * (bins[0] + bins[2]) // (2 * extent[0]), 2)
    row = min(3 * (bins[1] + bins[3]) // (2 * extent[1]), 2)
    return _GRID[language][row][column]


def structures_in(text: str) -> frozenset[int]:
    """Return the structures that a text names, in either language, the members of a pair for its common name.

    >>> sorted(structures_in("Are the Kidneys or a liver cyst visible?")), structures_in("肝脏和脾在哪里？") == {0, 1}
    ([9, 10], True)
    """
    found = _ANY_NAME.finditer(text.lower())
    return frozenset(i for match in found if match.lastindex for i in _MEANINGS[match.lastindex - 1])

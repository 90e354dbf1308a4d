"""The catalogue is consistent with itself."""

import re

import pytest

from foedus.assets import CATALOG


def test_the_catalogue_has_the_models_and_texts_that_the_project_promises():
    models = {name for name, asset in CATALOG.items() if asset.kind == "model"}
    assert models == {"smollm2-135m-instruct", "gemma-3-270m", "qwen2.5-coder-1.5b-instruct", "all-minilm-l6-v2"}
    assert CATALOG.keys() - models == {"20newsgroups", "reuters-r8", "reuters-r52", "friends", "election-tweets"}


@pytest.mark.parametrize("name", CATALOG)
def test_every_asset_is_pinned_and_described(name):
    asset = CATALOG[name]
    hashes = [one.sha256 for one in (*asset.distributions, *asset.files)]
    assert asset.name == name and asset.about and asset.licence
    assert asset.bytes == sum(one.bytes for one in asset.distributions) > 0
    assert all(re.fullmatch("[0-9a-f]{64}", sha256) for sha256 in hashes)
    assert len({one.sha256 for one in asset.distributions}) == len(asset.distributions)
    assert not any(member.endswith((".py", ".pkl", ".pickle", ".bin.pt")) for f in asset.files for member in f.members)


@pytest.mark.parametrize("name", [name for name, asset in CATALOG.items() if asset.kind == "dataset"])
def test_every_data_set_says_where_its_splits_and_its_text_are(name):
    asset = CATALOG[name]
    assert set(asset.splits.values()) == {file.name for file in asset.files}
    assert "text" in asset.columns and "domain" in asset.columns


def test_the_catalogue_cannot_be_changed():
    with pytest.raises(TypeError):
        CATALOG["mine"] = CATALOG["friends"]


def test_every_newsgroup_is_in_one_category_and_religion_is_talk():
    ((column, category),) = CATALOG["20newsgroups"].groups.values()
    assert column == "Category" and len(category) == 20
    assert set(category.values()) == {"comp", "misc", "rec", "sci", "talk"}
    assert category["alt.atheism"] == category["soc.religion.christian"] == category["talk.politics.guns"] == "talk"

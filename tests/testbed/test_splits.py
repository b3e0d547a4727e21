"""No example is in two splits, and every model takes the splits that it is given."""

import json
from itertools import combinations

import pytest
import torch

import testbed
from testbed import corpus, digits, language, minilm, store

ALL = ("training", *corpus.SPLITS)


def test_source_files_are_in_one_split_each():
    groups = [set(corpus.files_of(split)) for split in ALL]
    assert all(one.isdisjoint(other) for one, other in combinations(groups, 2))
    assert set().union(*groups) == set(corpus.source_files())
    assert all(groups)


def test_stored_windows_come_from_files_of_their_split():
    stored = json.loads((store.WEIGHTS / "text" / "files.json").read_text())
    assert set(stored) == set(corpus.SPLITS)
    for split, files in stored.items():
        assert {corpus.split_of(path) for path in files} == {split}


def test_stored_windows_are_never_repeated_between_splits():
    splits = testbed.load("gpt2").splits
    groups = [
        {row.tobytes() for row in splits[name].inputs["input_ids"].numpy()} for name in splits
    ]
    assert all(one.isdisjoint(other) for one, other in combinations(groups, 2))


def test_all_language_models_share_one_tokenizer():
    files = store.read_manifest()
    digests = {files[f"{name}/tokenizer.json"]["sha256"] for name in language.RECIPES}
    assert len(digests) == 1


def test_stored_windows_decode_to_source_text():
    model = testbed.load("gpt2")
    text = model.tokenizer.decode(model.splits["choosing"].inputs["input_ids"].flatten())
    assert text.count("    def ") > 20
    assert text.count("\n") > 500


def test_digit_rows_are_in_one_split_each():
    groups = [digits.rows_of(split) for split in ALL]
    assert sorted(row for group in groups for row in group) == list(range(1797))


def test_digit_images_are_never_repeated_between_splits():
    groups = [{image.numpy().tobytes() for image in digits.load(split).images} for split in ALL]
    assert all(one.isdisjoint(other) for one, other in combinations(groups, 2))


def test_sentences_are_in_one_split_each_and_never_repeated():
    groups = [[text for text, _ in minilm.sentences(split)] for split in corpus.SPLITS]
    texts = [text.lower() for group in groups for text in group]
    assert len(set(texts)) == len(texts) == sum(minilm.SENTENCES.values())


def test_sentences_come_from_each_package_alike():
    for split, count in minilm.SENTENCES.items():
        sources = [source for _, source in minilm.sentences(split)]
        assert [sources.count(index) for index in range(4)] == [count // 4] * 4


@pytest.mark.parametrize("name", testbed.names())
def test_a_model_takes_each_split_as_keyword_arguments(name):
    model = testbed.load(name)
    assert tuple(model.splits) == corpus.SPLITS
    for data in model.splits.values():
        with torch.no_grad():
            model.module(**data.part(slice(2)).inputs)


def test_a_split_is_cut_without_losing_an_example():
    data = testbed.load("cnn").splits["choosing"]
    parts = list(data.batches(64))
    assert [len(part) for part in parts] == [64, 64, 22]
    assert torch.equal(torch.cat([part.targets for part in parts]), data.targets)


def test_an_unknown_split_lists_the_known_ones():
    with pytest.raises(KeyError, match="there are calibration, choosing, reporting"):
        testbed.load("cnn").splits["training"]

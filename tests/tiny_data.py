"""Made-up texts and TFDS datasets, small enough to build in every session."""

from __future__ import annotations

import random


def write_tfds(root, address: str, splits: dict[str, list[dict[str, str]]]) -> None:
    """Records of text fields as the TFDS dataset name[/config] under root, in ArrayRecord."""
    import tensorflow_datasets as tfds

    dataset, _, variant = address.partition("/")
    fields = {key: tfds.features.Text() for key in next(iter(splits.values()))[0]}

    with tfds.core.registered.skip_registration():

        class Handmade(tfds.core.GeneratorBasedBuilder):
            name = dataset
            VERSION = tfds.core.Version("1.0.0")
            BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=variant)] if variant else []
            url_infos = None  # nothing to download

            def _info(self):
                features = tfds.features.FeaturesDict(fields)
                return tfds.core.DatasetInfo(
                    builder=self, features=features, disable_shuffling=True
                )

            def _split_generators(self, dl_manager):
                return {split: self._generate_examples(rows) for split, rows in splits.items()}

            def _generate_examples(self, rows):
                yield from enumerate(rows)

    tfds.disable_progress_bar()
    Handmade(data_dir=root, file_format="array_record").download_and_prepare(
        download_dir=root / "downloads"
    )


def made_up_documents(seed: int, count: int) -> list[dict[str, str]]:
    """Documents of 30 to 90 made-up words; the frequent ones are short."""
    rng = random.Random(seed)
    spell = random.Random(0)
    words = ["".join(spell.choices("aeiouklmnrst", k=2 + i // 20)) for i in range(120)]
    weights = [1 / (1 + i) for i in range(len(words))]
    rows = []
    for index in range(count):
        text = " ".join(rng.choices(words, weights, k=rng.randint(30, 90)))
        rows.append({"title": f"Made-up {seed}.{index}", "text": text.capitalize()})
    return rows


def varied_texts(seed: int = 0, count: int = 300) -> list[str]:
    """Texts of made-up words, the frequent ones short, with code, chat and other scripts."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("aeiouklmnrst", k=2 + i // 50)) for i in range(400)]
    weights = [1 / (1 + i) for i in range(400)]

    def sentence():
        return " ".join(rng.choices(words, weights, k=12)).capitalize() + "."

    lines = ["def f(x):\n    return {x: [x]}", "user: hi\nassistant: hello", "日本 שלום", ""]
    return [f"{sentence()} {sentence()}\n\n{rng.choice(lines)}" for _ in range(count)]

"""The config: strict, closed, worded by dotted key, and overridable by round."""

from pathlib import Path

import pytest

from jobs.config import ConfigError, Experiment, load_experiment, parse_experiment

MINIMAL = {
    "name": "tiny",
    "output": "outputs/tiny",
    "rounds": 2,
    "prepare": {"source": {"kind": "table", "path": "labels.csv"}},
}


def _with(**values: object) -> dict[str, object]:
    return {**MINIMAL, **values}


def test_a_loss_by_confidence_needs_the_confidence() -> None:
    values = _with(segmenter={"loss": "confidence"})
    with pytest.raises(ConfigError, match=r"segmenter\.loss = confidence: .* set pseudo_masks\.write_confidence"):
        parse_experiment(values)
    parse_experiment(values | {"pseudo_masks": {"write_confidence": True}})


def test_minimal_config_takes_the_papers_defaults() -> None:
    experiment = parse_experiment(MINIMAL)
    assert experiment.kmeans.num_clusters == 10
    assert experiment.classifier.subcategory_weight == 5.0
    assert experiment.for_round(1) is experiment


def test_unknown_key_names_the_dotted_key_and_the_nearest_valid_one() -> None:
    with pytest.raises(ConfigError, match=r"classifier\.optimiser\.epochss: unknown key; nearest: epochs"):
        parse_experiment(_with(classifier={"optimiser": {"epochss": 3}}))


def test_wrong_type_names_key_value_and_rule() -> None:
    with pytest.raises(ConfigError, match=r'classifier\.optimiser\.epochs = "3": .*integer'):
        parse_experiment(_with(classifier={"optimiser": {"epochs": "3"}}))


def test_range_is_checked() -> None:
    with pytest.raises(ConfigError, match=r"rng_seed = -1: .*greater than or equal to 0"):
        parse_experiment(_with(rng_seed=-1))


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ConfigError, match="2 problems") as error:
        parse_experiment(_with(rounds=-1, colour="red"))
    assert "rounds" in str(error.value)
    assert "colour" in str(error.value)


def test_missing_section_is_named() -> None:
    with pytest.raises(ConfigError, match="prepare: required"):
        parse_experiment({"name": "x", "output": "y"})


def test_round_overrides_apply_to_that_round_alone() -> None:
    experiment = parse_experiment(_with(round={"2": {"classifier": {"optimiser": {"epochs": 3}}}}))
    assert experiment.for_round(2).classifier.optimiser.epochs == 3
    assert experiment.for_round(1).classifier.optimiser.epochs == experiment.classifier.optimiser.epochs
    assert experiment.for_round(2).kmeans == experiment.kmeans


def test_round_override_errors_name_the_round() -> None:
    with pytest.raises(ConfigError, match=r"round\.1\.kmeans\.num_cluster: unknown key; nearest: num_clusters"):
        parse_experiment(_with(round={"1": {"kmeans": {"num_cluster": 4}}}))
    with pytest.raises(ConfigError, match=r"round\.3: this run has rounds 0 to 2"):
        parse_experiment(_with(round={"3": {"kmeans": {"num_clusters": 4}}}))
    with pytest.raises(ConfigError, match=r"round\.1\.segmenter: a round may override"):
        parse_experiment(_with(round={"1": {"segmenter": {}}}))


def test_the_published_schedules_can_be_said() -> None:
    stops = {str(index): {"classifier": {"optimiser": {"stop_after_epochs": 21 + 10 * index}}} for index in (1, 2)}
    classifier = {
        "augment": {"resize_side": "long", "resize_min_px": 256, "resize_max_px": 512, "crop_px": 224},
        "optimiser": {"epochs": 61, "momentum": 0.0005},
    }
    segmenter = {
        "model": {
            "backbone": {"name": "subcat:resnet101-caffe", "output_stride": 8, "weights": "coco.pth"},
            "train_scales": [1.0, 0.5, 0.75],
            "loss_at": "logits",
        },
        "augment": {"scales": [0.5, 0.75, 1.0, 1.25, 1.5], "crop_px": 321, "pad": "end", "jitter": [0.0] * 4},
        "optimiser": {"batch_size": 10, "max_steps": 20_000, "refresh_lr_every": 10},
    }
    crf = {
        "spatial_sigma_px": 1.0,
        "bilateral_sigma_px": 67.0,
        "bilateral_sigma_rgb": 3.0,
        "bilateral_weight": 4.0,
    }
    predict = {"scales": [1.0, 0.5, 0.75], "merge": "max", "flip": False, "crf": crf}
    experiment = parse_experiment(_with(classifier=classifier, round=stops, segmenter=segmenter, predict=predict))
    lengths = [experiment.for_round(index).classifier.optimiser.length(10_582).num_epochs for index in range(3)]
    assert lengths == [61, 31, 41]
    optimiser = experiment.segmenter.optimiser
    assert (optimiser.learning_rate, optimiser.momentum, optimiser.weight_decay) == (2.5e-4, 0.9, 5e-4)
    late = {"1": {"classifier": {"optimiser": {"stop_after_epochs": 62}}}}
    with pytest.raises(ConfigError, match=r"round\.1\.classifier\.optimiser: stop_after_epochs = 62 is beyond epochs"):
        parse_experiment(_with(classifier=classifier, round=late))
    other = {"architecture": "deeplabv3plus", "backbone": {"name": "subcat:resnet101-caffe"}}
    with pytest.raises(ConfigError, match=r"segmenter\.model: .*subcat:resnet101-caffe.* give deeplabv2"):
        parse_experiment(_with(segmenter={"model": other}))


@pytest.mark.parametrize("key", ["01", "²", "-1"])
def test_a_round_is_named_by_its_plain_number(key: str) -> None:
    with pytest.raises(ConfigError, match="this run has rounds 0 to 2"):
        parse_experiment(_with(round={key: {"kmeans": {"num_clusters": 4}}}))


def test_the_last_round_makes_no_clusters() -> None:
    with pytest.raises(ConfigError, match=r"round\.2\.kmeans: the last round makes no features and no clusters"):
        parse_experiment(_with(round={"2": {"kmeans": {"num_clusters": 4}}}))


def test_what_would_fail_after_hours_fails_at_once() -> None:
    with pytest.raises(ConfigError, match=r"classifier\.optimiser\.batch_size = 15: does not divide among 2 workers"):
        parse_experiment(_with(classifier={"optimiser": {"batch_size": 15}, "compute": {"num_workers": 2}}))
    with pytest.raises(ConfigError, match=r"segmenter\.compute\.input = ray: needs"):
        parse_experiment(_with(segmenter={"compute": {"input": "ray"}}))
    for kmeans in ({"spherical": True}, {"pca_dims": 8}):
        with pytest.raises(
            ConfigError, match=r"subcategory_targets = .soft. with kmeans\.spherical or kmeans\.pca_dims"
        ):
            parse_experiment(_with(classifier={"subcategory_targets": "soft"}, kmeans=kmeans))
    with pytest.raises(ConfigError, match="too coarse for masks"):
        parse_experiment(_with(segmenter={"model": {"backbone": {"output_stride": 32}}}))
    with pytest.raises(ConfigError, match=r"predict\.scales"):
        parse_experiment(_with(predict={"scales": []}))


def test_file_and_overrides(tmp_path: Path) -> None:
    path = tmp_path / "tiny.toml"
    path.write_text(
        'name = "tiny"\noutput = "out"\n[prepare.source]\nkind = "table"\npath = "labels.csv"\n'
        "[round.1]\nclassifier.optimiser.epochs = 9\n"
    )
    experiment = load_experiment(str(path), ["kmeans.num_clusters=4", "name=other words", "rounds=1"])
    assert (experiment.kmeans.num_clusters, experiment.name, experiment.rounds) == (4, "other words", 1)
    assert experiment.for_round(1).classifier.optimiser.epochs == 9


def test_unreadable_config_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_experiment(str(tmp_path / "none.toml"))
    broken = tmp_path / "broken.toml"
    broken.write_text("name = ")
    with pytest.raises(ConfigError, match=r"broken\.toml: not valid TOML"):
        load_experiment(str(broken))
    ok = tmp_path / "ok.toml"
    ok.write_text('name = "x"\n')
    with pytest.raises(ConfigError, match="expected KEY=VALUE"):
        load_experiment(str(ok), ["novalue"])


def test_flattened_has_dotted_keys_and_plain_text() -> None:
    flat = parse_experiment(MINIMAL).flattened()
    assert flat["prepare.source.path"] == "labels.csv"
    assert flat["kmeans.num_clusters"] == "10"
    assert all(isinstance(value, str) for value in flat.values())


def test_shipped_configs_are_valid() -> None:
    folder = Path(__file__).resolve().parents[2] / "configs"
    paths = sorted(folder.glob("*.toml"))
    assert paths, f"no config in {folder}"
    for path in paths:
        assert isinstance(load_experiment(str(path)), Experiment)


def test_the_papers_backbone_is_accepted_at_its_own_stride_alone() -> None:
    backbone = {"name": "subcat:resnet38d", "output_stride": 8, "weights": "none", "frozen_stages": 1}
    experiment = parse_experiment(_with(classifier={"backbone": backbone}, cams={"output_stride": 8}))
    assert experiment.for_round(1).classifier.backbone.name == "subcat:resnet38d"
    with pytest.raises(ConfigError, match=r"classifier\.backbone: output_stride = 16: subcat:resnet38d has stride 8"):
        parse_experiment(_with(classifier={"backbone": {"name": "subcat:resnet38d"}}))
    with pytest.raises(ConfigError, match=r"cams\.output_stride = 16: subcat:resnet38d has stride 8 only"):
        parse_experiment(_with(classifier={"backbone": backbone}, cams={"output_stride": 16}))

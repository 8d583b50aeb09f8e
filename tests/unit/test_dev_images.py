"""How images enter the embedded cluster: names of layers, hard links, and what counts as a whole image."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import io
import json
import os
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

DEV = Path(__file__).parents[2] / "dev"


@pytest.fixture(scope="module")
def images() -> ModuleType:
    """The script, which is in no package."""
    spec = importlib.util.spec_from_file_location("dev_images", DEV / "cluster/images.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def buildah_store(tmp_path: Path) -> Path:
    """A store with one image of two layers, as containers/storage lays it out."""
    store = tmp_path / "store"
    config = json.dumps({"config": {"User": "1000:1000"}})
    image_id = hashlib.sha256(config.encode()).hexdigest()
    blob = store / "overlay-images" / image_id / ("=" + base64.b64encode(f"sha256:{image_id}".encode()).decode())
    blob.parent.mkdir(parents=True)
    blob.write_text(config)
    images = [{"id": image_id, "names": ["localhost/it:1"], "layer": "top"}]
    (store / "overlay-images/images.json").write_text(json.dumps(images))
    layers = [{"id": "base", "diff-digest": "sha256:b"}, {"id": "top", "parent": "base", "diff-digest": "sha256:t"}]
    (store / "overlay-layers").mkdir()
    (store / "overlay-layers/layers.json").write_text(json.dumps(layers))
    for layer in ("base", "top"):
        (store / "overlay" / layer / "diff").mkdir(parents=True)
    return store


def test_a_stack_of_layers_is_named_as_the_image_specification_says(images: ModuleType) -> None:
    assert images.chain_id("", "sha256:a") == "sha256:a"
    assert images.chain_id("sha256:a", "sha256:b") == "sha256:" + hashlib.sha256(b"sha256:a sha256:b").hexdigest()


def test_the_stand_in_of_a_layer_depends_on_its_identity_alone(images: ModuleType) -> None:
    assert images.stand_in("sha256:a") == images.stand_in("sha256:a") != images.stand_in("sha256:b")
    with tarfile.open(fileobj=io.BytesIO(images.stand_in("sha256:a"))) as tar:
        assert tar.getnames() == [".layer"]


def test_a_layer_is_linked_and_not_copied(images: ModuleType, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "folder").mkdir(parents=True)
    (source / "folder/file").write_text("x")
    (source / "link").symlink_to("folder/file")
    target.mkdir()
    images.link_tree(source, target)
    assert os.path.samefile(source / "folder/file", target / "folder/file")
    assert os.readlink(target / "link") == "folder/file"
    assert images.count_files(target) == 3


def test_an_image_of_buildah_is_read_base_first(images: ModuleType, buildah_store: Path) -> None:
    image = images.image_of_buildah(buildah_store, "localhost/it:1")
    assert [layer.identity for layer in image.layers] == ["sha256:b", "sha256:t"]
    assert image.config == {"User": "1000:1000"}


@pytest.mark.parametrize("lost", ["overlay/base/diff", "overlay-images/images.json"])
def test_an_image_with_a_lost_layer_is_not_whole(images: ModuleType, buildah_store: Path, lost: str) -> None:
    path = buildah_store / lost
    path.rmdir() if path.is_dir() else path.unlink()
    with pytest.raises(images.NOT_WHOLE):
        images.image_of_buildah(buildah_store, "localhost/it:1")


def test_an_image_that_was_never_built_is_not_whole(images: ModuleType, buildah_store: Path) -> None:
    with pytest.raises(images.NOT_WHOLE):
        images.image_of_buildah(buildah_store, "localhost/other:1")

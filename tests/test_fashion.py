"""The Fashion-MNIST flow: a user's own diffusers pipeline, and its schedules replayed in it."""

import io
import tarfile
from pathlib import Path

import pytest
import torch

from fewstep.experiments.models import assets, fashion
from fewstep.samplers import sample, start
from fewstep.samplers.diffusers import FewstepScheduler
from fewstep.samplers.saved_pipeline import load_pipeline
from fewstep.search.config import study_from_dict
from fewstep.search.family import settled
from fewstep.space import load_schedule
from fewstep.space.baselines import baseline
from fewstep.space.errors import ModelError

pytest.importorskip("diffusers")

FOUND = Path(__file__).parents[1] / "experiments/studies/fashion_nfe05.json"


@pytest.fixture(scope="module")
def pipe() -> fashion.FashionPipeline:
    made = fashion.FashionPipeline.from_pretrained(str(fashion.FOLDER), local_files_only=True)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def problem():
    return fashion.problem(4.0)


def test_the_stock_schedule_gives_the_images_of_the_pipeline_itself(pipe, problem):
    (schedule,) = problem.baselines(5).values()
    z = torch.randn(4, 4, 14, 14, generator=torch.Generator().manual_seed(1))
    call = {"guidance_scale": 4.0, "num_inference_steps": 5, "output_type": "latent"}
    want = pipe([0, 1, 2, 3], latents=z, **call).images
    cond = problem.cond(torch.arange(4))
    got = sample(schedule, problem.denoiser, start(schedule, z), cond=cond, guidance=4.0)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    "made",
    [
        pytest.param(lambda noise: baseline("unipc2-bh2/logsnr", noise, 5), id="named"),
        pytest.param(lambda noise: load_schedule(FOUND), id="found"),
    ],
)
def test_a_schedule_replayed_in_the_pipeline_gives_what_sample_gives(pipe, problem, made):
    schedule = made(problem.denoiser.noise)
    z = torch.randn(3, 4, 14, 14, generator=torch.Generator().manual_seed(2))
    cond = problem.cond(torch.arange(3))
    want = sample(schedule, problem.denoiser, start(schedule, z), cond=cond, guidance=4.0)
    stock = pipe.scheduler
    try:
        pipe.scheduler = FewstepScheduler.from_config(stock.config, schedule=schedule.to_dict())
        call = {"guidance_scale": 4.0, "num_inference_steps": 5, "output_type": "latent"}
        got = pipe([0, 1, 2], latents=z, **call).images
    finally:
        pipe.scheduler = stock
    torch.testing.assert_close(got, want, atol=2e-5, rtol=0)


def test_a_pipeline_of_a_class_of_ones_own_is_refused_from_its_folder():
    with pytest.raises(ModelError, match=r"FashionPipeline .* name that as model\.factory"):
        load_pipeline(fashion.FOLDER)


def test_what_is_fitted_for_a_pipeline_that_does_not_scale_its_input_starts_at_the_noise(problem):
    assert problem.plain_start
    config = study_from_dict(
        {
            "model": {"factory": "fewstep.experiments.models.fashion:problem"},
            "budget": {"candidates": 200},
            "search": {"nfe": [5]},
        }
    )
    assert config.refine.mean
    assert not settled(config, problem).refine.mean


def test_gray_images_are_decoded_as_rgb(problem):
    x = torch.randn(2, 4, 14, 14, generator=torch.Generator().manual_seed(3))
    images = problem.decode(x)
    assert images.shape == (2, 3, 28, 28)
    gray = (torch.nn.functional.pixel_shuffle(x, 2) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(images, gray.expand(-1, 3, -1, -1), atol=1e-6, rtol=0)


def test_guided_samples_are_read_as_their_class(problem):
    schedule = baseline("dpmpp2m/logsnr", problem.denoiser.noise, 16)
    z = torch.randn(40, 4, 14, 14, generator=torch.Generator().manual_seed(4))
    cond = problem.cond(torch.arange(40))
    x = sample(schedule, problem.denoiser, start(schedule, z), cond=cond, guidance=4.0)
    images = torch.nn.functional.pixel_shuffle(x, 2)
    read = fashion.load_classifier()(images).argmax(1)
    assert (read == torch.arange(40) % 10).float().mean() >= 0.8


def test_a_member_is_read_out_of_a_debian_package(tmp_path, monkeypatch):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:xz") as tar:
        info = tarfile.TarInfo("./usr/share/x")
        info.size = 5
        tar.addfile(info, io.BytesIO(b"hello"))
    data = packed.getvalue()

    def member(name: str, content: bytes) -> bytes:
        head = f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
        return head + content + b"\n" * (len(content) % 2)

    whole = b"!<arch>\n" + member("debian-binary", b"2.0\n") + member("control.tar.xz", b"odd")
    (tmp_path / "x_1_all.deb").write_bytes(whole + member("data.tar.xz", data))
    digest = assets.hashlib.sha256((tmp_path / "x_1_all.deb").read_bytes()).hexdigest()
    made = assets.Asset(requirement="x=1", filename="x_1_all.deb", sha256=digest, licence="none")
    monkeypatch.setitem(assets.ASSETS, "x", made)
    monkeypatch.setenv("FEWSTEP_ASSETS", str(tmp_path))
    assert assets.read_member("x", "usr/share/x") == b"hello"
    with pytest.raises(assets.AssetError, match="no member usr/share/y"):
        assets.read_member("x", "usr/share/y")

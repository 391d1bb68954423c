"""The molecule model's tokens, network and metrics."""

import pytest
import torch
from safetensors import safe_open

from fewstep.experiments.benchmarks import metrics_molecules, particles_molecules
from fewstep.experiments.models import molecules, train_molecules
from fewstep.experiments.models.assets import AssetError
from fewstep.experiments.models.molecules import LENGTH, MASK, PAD, MoleculeNet, NetConfig
from fewstep.samplers import MaskedProblem, fingerprint, from_subs, sample_masked
from fewstep.samplers.curve import load_curve
from fewstep.search.objective import Measured
from fewstep.space.counts import COUNTS, best_counts, counts_by_name, counts_cost
from fewstep.space.masked import MaskedSchedule

ASPIRIN = "CC(=O)Oc1ccccc1C(=O)O"


def test_decode_undoes_encode() -> None:
    smiles = [ASPIRIN, "Brc1c[nH]c2c1C(Cl)#N2", "CCCCC", "#" * LENGTH]
    ids = molecules.encode(smiles)
    assert ids.shape == (4, LENGTH)
    assert molecules.decode(ids) == smiles
    assert ids[0, -1] == PAD


def test_pieces_are_what_byte_pair_encoding_learns() -> None:
    assert len(molecules.PIECES) == molecules.PAD
    assert len(set(molecules.PIECES)) == molecules.PAD
    pairs = molecules.learn_pieces(["CCCC", "CCCC", "CCO"], 2)
    assert [tuple(molecules.TOKENS.index("C") for _ in range(2)), (24, 24)] == pairs


def test_what_the_model_does_not_know_is_refused() -> None:
    with pytest.raises(ValueError, match="'I' of 'CCI' is not in the vocabulary"):
        molecules.encode(["CCI"])
    with pytest.raises(ValueError, match="molecule 1 has 21 pieces; the model holds 20"):
        molecules.encode(["CC", "#" * 21])
    assert molecules.encode(["CC", "#" * 21], drop=True).shape == (1, LENGTH)
    with pytest.raises(ValueError, match="still holds masks"):
        molecules.decode([[0, MASK]])


def test_a_network_survives_its_file_in_half_precision(tmp_path) -> None:
    net = MoleculeNet(NetConfig(width=32, depth=1, heads=2))
    path = tmp_path / "net.safetensors"
    molecules.save_net(net, path, {"steps": 0})
    loaded = molecules.load_net(path)
    tokens = torch.randint(MASK + 1, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(net(tokens), loaded(tokens), atol=1e-2)
    with pytest.raises(ValueError, match="not a version 1 molecule network"):
        molecules.load_net(metrics_molecules.REFERENCE)


def test_training_is_the_same_run_when_it_is_resumed(tmp_path, monkeypatch) -> None:
    data = torch.from_numpy(molecules.encode([ASPIRIN, "CCO", "c1ccccc1"] * 50))
    monkeypatch.setattr(train_molecules, "load_tokens", lambda *_: data)
    command = "--width 32 --heads 2 --depth 1 --batch 4 --held 10 --decay 100".split()

    def run(name: str, *extra: object) -> dict[str, torch.Tensor]:
        arguments = [*command, "--out", tmp_path / name, *extra]
        monkeypatch.setattr("sys.argv", ["train", *map(str, arguments)])
        train_molecules.main()
        return molecules.load_net(tmp_path / name).state_dict()

    whole = run("a", "--steps", 350, "--device", "cpu")
    kept = tmp_path / "kept.safetensors"
    run("b", "--steps", 350, "--checkpoint", kept, "--device", "cpu")
    with safe_open(kept, framework="pt") as file:
        assert file.metadata()["step"] == "350"
    cut = tmp_path / "cut.safetensors"

    class Stopped(Exception):
        pass

    save = train_molecules.Run.save

    def stop(self: train_molecules.Run, path) -> None:
        save(self, path)
        raise Stopped

    monkeypatch.setattr(train_molecules.Run, "save", stop)
    with pytest.raises(Stopped):  # asked for more than will be done: the rate is still constant
        run("c", "--steps", 5000, "--checkpoint", cut, "--device", "cpu")
    monkeypatch.setattr(train_molecules.Run, "save", save)
    resumed = run("c", "--steps", 350, "--checkpoint", cut, "--device", "cpu")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_the_frechet_distance_of_known_gaussians() -> None:
    a, b = torch.eye(3, dtype=torch.float64), 4 * torch.eye(3, dtype=torch.float64)
    mu = torch.zeros(3, dtype=torch.float64)
    assert metrics_molecules.frechet(mu, a, mu + 1, b) == pytest.approx(3 + 3)
    assert metrics_molecules.frechet(mu, b, mu, b) == pytest.approx(0, abs=1e-12)


def test_the_reference_statistics_are_a_mean_and_a_covariance() -> None:
    mu, sigma = metrics_molecules.reference()
    assert mu.shape == (512,)
    assert torch.allclose(sigma, sigma.T)
    assert float(torch.linalg.eigvalsh(sigma).min()) > -1e-9


def test_the_excess_hardly_depends_on_how_many_were_drawn() -> None:
    mu, sigma = metrics_molecules.reference()
    values, vectors = torch.linalg.eigh(1.1 * sigma)  # a law of its own, a little wider
    root = vectors * values.clamp(min=0).sqrt()
    z = torch.randn(1200, 512, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    features = mu + z @ root.T
    plain = [metrics_molecules.fcd(features[:n]) for n in (300, 1200)]
    floors = [metrics_molecules.fcd_floor(n) for n in (300, 1200)]
    assert plain[0] > 3 * plain[1]
    assert abs((plain[0] - floors[0]) - (plain[1] - floors[1])) < 0.1 * (plain[0] - plain[1])


def test_scores_count_what_they_say() -> None:
    pytest.importorskip("rdkit")
    assert metrics_molecules.canonical(["OCC", "C1CC", ""]) == ["CCO", None, None]
    try:
        scores = metrics_molecules.score(["OCC", "CCO", "C(", "CCC"], known={"CCC"})
    except AssetError as error:
        pytest.skip(str(error))
    assert (scores.n, scores.validity) == (4, 0.75)
    assert scores.uniqueness == pytest.approx(2 / 3)
    assert scores.novelty == 0.5
    assert scores.fcd > 10


def test_the_shipped_network_draws_molecules() -> None:
    pytest.importorskip("rdkit")
    if not molecules.WEIGHTS.exists():
        pytest.skip("no trained weights: python -m fewstep.experiments.models.train_molecules")
    assert molecules.WEIGHTS.stat().st_size <= 4_000_000
    denoiser = from_subs(molecules.load_net(), MASK, length=LENGTH)
    drawn = sample_masked(
        MaskedSchedule.token_by_token(LENGTH),
        denoiser,
        torch.full((50, LENGTH), MASK),
        generator=torch.Generator().manual_seed(0),
    )
    valid = [s for s in metrics_molecules.canonical(molecules.decode(drawn)) if s]
    assert len(valid) >= 15  # .56 of them on average
    assert len(set(valid)) == len(valid)


def test_the_curve_is_that_of_the_network_shipped() -> None:
    curve = load_curve(molecules.CURVE)
    assert curve.model == fingerprint(molecules.load_net(), "molecules")
    assert len(curve.values) == len(curve.errors) == LENGTH
    counts = best_counts(curve.values)
    for calls in (2, 4, 8, 16):
        costs = [counts_cost(curve.values, counts_by_name(n, LENGTH, calls)) for n in COUNTS]
        assert counts_cost(curve.values, counts[calls - 1]) <= min(costs)


def test_populations_of_molecules_are_tilted_towards_drug_likeness() -> None:
    pytest.importorskip("rdkit")
    problem = particles_molecules.problem(beta=8.0, particles=24)
    schedule = problem.named(4)["dp"]
    tokens, generator = torch.full((6, LENGTH), MASK), torch.Generator().manual_seed(0)
    u = torch.zeros(6, 2, LENGTH, dtype=torch.float64)  # of sequences; populations do not use it
    found = problem.sample(schedule, problem.denoiser, tokens, u=u, generator=generator)
    assert found.x.shape == (6, 24, LENGTH)
    rows = problem.measure(found)
    assert rows.shape == (6, 5)
    assert float(rows.min()) >= 0  # the reward is never positive
    assert float(rows[:, 1:].max()) <= 1
    facts = problem.facts(rows.numpy())
    assert facts["qed"] == pytest.approx(float(rows[:, 1].mean()))
    qed = particles_molecules.qed_of(found.x.flatten(0, 1)).reshape(6, 24)
    assert not bool(qed.gather(1, found.log_weights.argmax(1, keepdim=True)).isnan().any())
    assert bool((found.log_weights[~qed.isnan()] >= -8.0).all())
    assert bool((found.log_weights[qed.isnan()] == -11.0).all())
    assert problem.per_sample == 24


def test_the_problem_measures_molecules_and_leaves_out_what_is_none() -> None:
    pytest.importorskip("rdkit")
    if not molecules.WEIGHTS.exists():
        pytest.skip("no trained weights: python -m fewstep.experiments.models.train_molecules")
    try:
        problem = molecules.problem()
    except AssetError as error:
        pytest.skip(str(error))
    assert isinstance(problem, MaskedProblem)
    assert problem.named(8)["dp"].counts == best_counts(problem.curve)[7]
    smiles = [ASPIRIN, "CCO", "OCC", "C(C", "CCCCC"]
    tokens = torch.from_numpy(molecules.encode(smiles)).long()
    measures = problem.measure(tokens)
    assert measures.shape == (5, 514)
    assert measures.isnan().all(1).tolist() == [False, False, False, True, False]
    assert torch.equal(measures[1], measures[2])  # one molecule, written in two ways
    four = metrics_molecules.fcd(measures[[0, 1, 2, 4], :512])
    facts = problem.facts(measures.float().double().numpy())
    assert facts == {"fcd": pytest.approx(four), "validity": 0.8, "uniqueness": 0.75}
    objective = Measured(problem)
    excess = four - metrics_molecules.fcd_floor(4)
    assert objective.score(measures.numpy(), None) == pytest.approx(excess)
    assert objective.score(measures[2:4].numpy(), None) == float("inf")
    drawn = problem.picture(tokens)
    assert drawn.shape == (5, 150, 150, 3)
    assert float(drawn[3].min()) == 1  # blank
    assert float(drawn[0].min()) < 1

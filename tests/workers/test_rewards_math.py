r"""The reward `math`: the final answer of a response against the mathematics of its reference."""

import pytest

from distill_api.spec.job_spec import Extract
from distill_workers.data.sample import Prompt
from distill_workers.rewards.math import grade_mathematically


def score(reference: str, response: str, question: str = "", extract: Extract = Extract.FINAL) -> float:
    return grade_mathematically(Prompt(0, [], question, reference), response, extract).score


REFERENCES = [
    r"\frac{3}{7}", r"\frac37", r"\frac 59", r"1\frac{4}{5}", "[2,3)", r"(-\infty, 0]", r"(0,9) \cup (9,36)", "6 - 5i",
    r"2\pi r", r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", "1,-2", r"\{1\pm\sqrt{5},-2\}", "(4,-2)", r"\$18.90",
    r"12\%", r"\text{(C)}", r"\text{Friday}", r"5.4 \text{ cents}", "7 cm", r"10,\!080", "145_8", r"x \in [-2,7]",
    r"\pm 2", "1:2", "6:30", r"\emptyset", "A,C", "5x - 7y + 4 = 0", ".0000672", r"90^\circ", r"\text{no solution}",
]  # fmt: skip


@pytest.mark.parametrize("reference", REFERENCES)
def test_a_reference_in_a_box_is_right_for_itself(reference: str) -> None:
    assert score(reference, rf"So the answer is $\boxed{{{reference}}}$.") == 1.0


@pytest.mark.parametrize(
    ("reference", "response"),
    [
        ("1/2", r"\boxed{\frac{2}{4}}"),
        ("0.5", r"\boxed{50\%}"),
        (r"\{1,2\}", r"\boxed{2,1}"),
        ("1,2", r"so $\boxed{1}$ and $\boxed{2}$"),
        (r"1 \pm \sqrt{19}", r"\boxed{1+\sqrt{19}, 1-\sqrt{19}}"),
        ("10", "The answer is 10 cm."),
        ("8", "The answer to 3 + 5 is 8."),
        ("C", r"\boxed{\text{(C) } 12}"),
        ("Paris", "The answer is Paris."),
        ("2+40=<<2+40=42>>42\n#### 42", "#### 42"),
        ("42", r"<think>\boxed{41}</think> So 40 + 2 = 42."),
        ("2000000", r"\boxed{2 million}"),
    ],
)
def test_the_same_mathematics_is_right(reference: str, response: str) -> None:
    assert score(reference, response) == 1.0


@pytest.mark.parametrize(
    ("reference", "response"),
    [
        ("-4", "The answer to the 5 - 9 is 5."),
        ("3", r"First \boxed{3}, but no: \boxed{4}."),
        ("(1,2)", r"\boxed{[1,2]}"),
        ("(1,2)", r"\boxed{(2,1)}"),
        ("10 cm", r"\boxed{10 \text{ mm}}"),
        (r"\text{June 20}", r"\boxed{\text{June 21}}"),
        ("9", "There were 7 birds and 9 cats, I do not know."),
        ("41", r"<think>\boxed{41}</think> I do not know."),
        ("41", r"<think>It is \boxed{41}"),
        ("7", r"\boxed{"),
        ("1,2", r"\boxed{1}"),
        ("0.0000672", r"\boxed{0.000067}"),
    ],
)
def test_another_answer_is_wrong(reference: str, response: str) -> None:
    assert score(reference, response) == 0.0


@pytest.mark.parametrize("response", ["5 - 9", "What is 5 - 9?", "The answer is 5 - 9.", r"\boxed{5-9}"])
def test_what_the_question_asks_for_is_no_answer_to_it(response: str) -> None:
    assert score("-4", response, "What is 5 - 9?") == 0.0


def test_extract_chooses_what_of_a_response_is_graded() -> None:
    stated, mentioned = "The answer is 7.", "From 7 apples 3 are left: 3."
    found = {e: (score("7", stated, extract=e), score("7", mentioned, extract=e)) for e in Extract}
    assert found == {Extract.BOXED: (0.0, 0.0), Extract.FINAL: (1.0, 0.0), Extract.ANYWHERE: (1.0, 1.0)}

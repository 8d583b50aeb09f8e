r"""The reward `math`: the final answer of a response against the mathematics of its reference."""

import time

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
    "17.25 dollars", r"7\sqrt{3}", "3,4,5", "3^{12}", "2e-5", r"\log_3 7", "0.75", r"\infty", r"\tan x", "False", "+3",
    "0", "b_2", "x^2-4x+4", "k^2-9", r"\frac{\sqrt{5}}{3}", "[-1,6]", "54321", "49", "{1, 2}", "x=1, y=2", "2 million",
    r"10 \text{ cm}^2", "60 km/h", "20 percent", "5 apples", r"x=-1 \text{ or } x=3", "100, 200",
    r"\$18 \text{ per day}", r"-\infty", r"23,\!456", r"6.5 \text{ cents}", "2:3", "7:45", "+8", "c_3", r"\cot y",
    "B,D", "True",
]  # fmt: skip


@pytest.mark.parametrize("reference", REFERENCES)
def test_a_reference_in_a_box_is_right_for_itself(reference: str) -> None:
    assert score(reference, rf"So the answer is $\boxed{{{reference}}}$.") == 1.0


@pytest.mark.parametrize(
    ("reference", "response"),
    [
        ("1/2", r"\boxed{\frac{2}{4}}"),
        ("0.25", r"\boxed{25\%}"),
        (r"\frac{3}{4}", r"\boxed{0.75}"),
        (r"\{3,8\}", r"\boxed{8,3}"),
        ("1,2", r"so $\boxed{1}$ and $\boxed{2}$"),
        (r"1 \pm \sqrt{19}", r"\boxed{1+\sqrt{19}, 1-\sqrt{19}}"),
        ("15", "The answer is 15 km."),
        ("9", "The answer to 2 + 7 is 9."),
        ("C", r"\boxed{\text{(C) } 12}"),
        ("Paris", "The answer is Paris."),
        ("2+40=<<2+40=42>>42\n#### 42", "#### 42"),
        ("She reads 3 and 30, 3+30=<<3+30=33>>33 in all.\n#### 33", r"So it is $\boxed{33}$."),
        ("42", r"<think>\boxed{41}</think> So 40 + 2 = 42."),
        ("2000000", r"\boxed{2 million}"),
        ("3/4", r"\boxed{\frac34}"),
        (r"\frac{3}{6}", r"\boxed{\frac{1}{2}}"),
        (r"40\%", r"\boxed{40}"),
        (r"12 \text{ m}", r"\boxed{12}"),
        ("60", r"\boxed{60^\circ}"),
        ("2000", r"\boxed{2,000}"),
        ("Each of 4 costs 1,500: 4*1,500 = <<4*1500=6000>>6,000.\n#### 6,000", r"\boxed{6000}"),
        ("D", r"\boxed{\text{D}}"),
        ("n=7", r"\boxed{7}"),
        ("8", r"<think>perhaps \boxed{9}</think> Answer: \boxed{8}"),
        ("Rome", r"\boxed{Rome}"),
    ],
)
def test_the_same_mathematics_is_right(reference: str, response: str) -> None:
    assert score(reference, response) == 1.0


@pytest.mark.parametrize(
    ("reference", "response"),
    [
        ("-6", "The answer to the 2 - 8 is 2."),
        ("5", r"At first \boxed{5}, but then: \boxed{6}."),
        ("(3,8)", r"\boxed{[3,8]}"),
        ("(3,8)", r"\boxed{(8,3)}"),
        ("10 cm", r"\boxed{10 \text{ mm}}"),
        (r"\text{May 3}", r"\boxed{\text{May 4}}"),
        ("6", "There were 4 dogs and 6 fish, I do not know."),
        ("41", r"<think>\boxed{41}</think> I do not know."),
        ("41", r"<think>It is \boxed{41}"),
        ("6", r"\boxed{"),
        ("1,2", r"\boxed{1}"),
        ("0.0000672", r"\boxed{0.000067}"),
        ("He has 15 left.\n#### 6", r"\boxed{15}"),
        ("B", r"\boxed{D}"),
        ("-3", r"\boxed{3}"),
        ("no", r"\boxed{yes}"),
        ("9", ""),
        ("9", "The answer to the 9 - 0 is 0."),
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


@pytest.mark.parametrize(
    ("reference", "response"),
    [
        (r"90^\circ", r"\boxed{90}"),
        (r"90^\circ", "The answer is 90."),
        (r"90^\circ", r"\boxed{90 \text{ degrees}}"),
        ("90 degrees", r"\boxed{90^\circ}"),
        (r"\frac{45}{2}^\circ", r"\boxed{22.5}"),
        ("18.50 dollars", r"\boxed{18.50}"),
        ("18.50 dollars", r"\boxed{\$18.50}"),
        (r"\$18.50", r"\boxed{18.5 \text{ dollars}}"),
        (r"\$18.50", "It costs $18.50."),
        ("18", "The answer is $18 per day."),
        ("18 dollars per day", r"\boxed{\$18}"),
        ("5.4 cents", r"\boxed{5.4}"),
        ("10 centimeters", r"\boxed{10 \text{ cm}}"),
        ("10 inches", r"\boxed{10}"),
        ("10 square inches", r"\boxed{10 \text{ in}^2}"),
        (r"10 \text{ cm}^2", r"\boxed{10 \text{ square centimeters}}"),
        (r"10 \text{ cm}^2", r"\boxed{10}"),
        ("60 km/h", r"\boxed{60 \text{ kilometers per hour}}"),
        ("60 km/h", "So the speed is 60 km/h on both days of the journey."),
        ("60 miles per hour", r"\boxed{60 \text{ mph}}"),
        ("50 percent", r"\boxed{50\%}"),
        ("50 percent", r"\boxed{0.5}"),
        ("2 million", r"\boxed{2000000}"),
        ("2 million", r"\boxed{2,000,000}"),
        ("12 apples", r"\boxed{12}"),
        ("12 apples", "She has 12 apples."),
        ("12 apples", r"\boxed{12 \text{ red apples}}"),
        ("3 hours", "It takes Tom 3 hours to paint the whole house alone."),
        ("18 dollars", r"\boxed{18 \text{ in total}}"),
        (r"106^\circ", r"So $180^\circ - \angle A = 106^\circ$."),
        ("100 million dollars", r"\boxed{\$100 \text{ million}}"),
        ("12 percent of the class", r"\boxed{12}"),
        (r"12\pi \text{ inches}", r"\boxed{12\pi}"),
        ("5 euros", r"\boxed{€5}"),
        ("5 km^2", r"\boxed{5 \text{ km squared}}"),
        ("32 degrees Fahrenheit", r"\boxed{32^\circ}"),
        (r"5^\circ\text{C}", r"\boxed{5}"),
    ],
)
def test_a_unit_may_be_left_out_or_written_otherwise(reference: str, response: str) -> None:
    assert score(reference, response) == 1.0


@pytest.mark.parametrize(
    ("reference", "response"),
    [
        (r"\$5", r"\boxed{5 \text{ cents}}"),
        ("5 cents", r"\boxed{\$5}"),
        ("5 dollars", "The answer is €5."),
        (r"10 \text{ cm}^2", r"\boxed{10 \text{ cm}}"),
        (r"10 \text{ cm}^2", r"\boxed{10 \text{ cm}^3}"),
        ("10 square inches", r"\boxed{10 \text{ inches}}"),
        ("10 km/h", r"\boxed{10 \text{ m/s}}"),
        ("10 km/h", r"\boxed{10 \text{ km}}"),
        ("10 kilometers per hour", r"\boxed{10 \text{ km per minute}}"),
        ("10 cm", "The answer is 10 mm."),
        ("10 cm", "So the longest side of that triangle is 10 mm."),
        ("10 cm", "It is 10 mm."),
        ("12 apples", r"\boxed{12 \text{ oranges}}"),
        ("12 apples", r"\boxed{12 \text{ cm}}"),
        ("10 cm", r"\boxed{10 \text{ oranges}}"),
        ("90 degrees", r"\boxed{90 \text{ radians}}"),
        ("2 million", r"\boxed{2}"),
        ("2", "So the whole town has 2 million trees in its woods."),
        ("2 million", r"\boxed{2 \text{ billion}}"),
        ("5 percent", r"\boxed{5 \text{ dollars}}"),
        (r"5\%", r"\boxed{\$5}"),
        (r"\text{June 20}", r"\boxed{20}"),
        ("20 June", r"\boxed{20}"),
        ("3 hours 20 minutes", r"\boxed{20}"),
        ("3 hours 20 minutes", r"\boxed{3}"),
        ("room 12", r"\boxed{12}"),
        ("4 of clubs", r"\boxed{4}"),
        ("2 is even", r"\boxed{2}"),
        ("5 pm", r"\boxed{5 \text{ am}}"),
        (r"\$100 \text{ million}", r"\boxed{\$100}"),
        (r"-\$5", r"\boxed{\$5}"),
        ("10 m/s^2", r"\boxed{10 \text{ m/s}}"),
        ("32 degrees Fahrenheit", r"\boxed{32^\circ\text{C}}"),
        (r"12\pi \text{ inches}", r"\boxed{12\pi \text{ feet}}"),
        (r"2\pi h", r"\boxed{2\pi}"),
        (r"2\pi rh", r"\boxed{2\pi}"),
        (r"2\pi", r"\boxed{2\pi h}"),
        ("12 apples", "The answer is 12 oranges."),
        ("10 cm", "The rope is 10 inches long."),
        ("10 cm", r"\boxed{3 \text{ cm} + 7 \text{ cm} = 10 \text{ mm}}"),
    ],
)
def test_another_unit_is_wrong(reference: str, response: str) -> None:
    assert score(reference, response) == 0.0


@pytest.mark.parametrize(
    ("reference", "response"),
    [
        ("-1,3", r"\boxed{x=-1 \text{ or } x=3}"),
        ("-1,3", r"\boxed{x=3, x=-1}"),
        ("-1,3", r"\boxed{x_1 = -1 \text{ and } x_2 = 3}"),
        ("-1,3", r"$\boxed{x=-1}$ or $\boxed{x=3}$"),
        ("x=-1 or x=3", r"\boxed{-1, 3}"),
        (r"\{-1,3\}", r"\boxed{x=-1, 3}"),
        ("(1,2)", r"\boxed{x=1, y=2}"),
        ("(1,2)", r"\boxed{y=2, x=1}"),
        ("x=1, y=2", r"\boxed{(1,2)}"),
        ("x=1, y=2", r"\boxed{y=2, x=1}"),
        ("(1,2)", r"\boxed{(x,y)=(1,2)}"),
        (r"\{1,2\}", "The solution set is {1, 2}."),
        (r"\{1,2\}", "The solution set is {2,1}"),
        ("1,2", r"\boxed{{1, 2}}"),
        (r"\{100, 200\}", r"\boxed{{200, 100}}"),
        ("100, 200", r"\boxed{200, 100}"),
        (r"\{100, 200\}", r"\boxed{200 \text{ and } 100}"),
        ("5", r"\boxed{{5}}"),
        ("10 cm, 20 cm", r"\boxed{10, 20}"),
        ("m=3, b=2", r"\boxed{b=2, m=3}"),
        ("m=3, b=2", r"\boxed{3, 2}"),
        ("y=2x+1", r"\boxed{f(x)=2x+1}"),
        ("3/4", r"\boxed{\frac34 \text{ or } 0.75}"),
        ("0.75", "The answer is 3/4 or 0.75."),
    ],
)
def test_the_items_of_a_list_are_compared_one_by_one(reference: str, response: str) -> None:
    assert score(reference, response) == 1.0


@pytest.mark.parametrize(
    ("reference", "response"),
    [
        ("3", r"\boxed{x=-1 \text{ or } x=3}"),
        ("3", r"$\boxed{x=-1}$ or $\boxed{x=3}$"),
        ("-1,3", r"\boxed{x=3}"),
        ("-1,3", r"\boxed{x=-1, x=3, x=4}"),
        ("(1,2)", r"\boxed{x=2, y=1}"),
        ("(1,2)", r"\boxed{y=1, x=2}"),
        ("x=1, y=2", r"\boxed{x=2, y=1}"),
        ("x=1, y=2", r"\boxed{(2,1)}"),
        ("m=3, b=2", r"\boxed{m=2, b=3}"),
        ("x=5", r"\boxed{y=5}"),
        ("2", "The solution set is {1, 2}."),
        ("(1,2)", r"\boxed{{1, 2}}"),
        (r"\{1,2\}", r"\boxed{(1,2)}"),
        ("12", r"\boxed{{1, 2}}"),
        ("5", r"\boxed{5 \text{ or } 6}"),
        ("5", "The answer is 5 or 6."),
        ("6", "The answer is 5 or 6."),
        ("5", "The answer is either 5 or 6."),
        ("5", "The answer is 5, or maybe 6."),
        ("5", "The answer is 5 or possibly 6."),
        ("5", "The answer is 5, 6, 7"),
        ("5", "The answer is 5 dollars or 6 dollars."),
        ("5", "The answer is $5$ or $6$."),
        ("6", "So x is 5 or 6."),
        ("6", "Therefore the number of apples in the basket is 5 or 6."),
        ("5", "The answer is 5 and 6."),
        ("5", "The answer is 5 to 6."),
        ("5", "The answer is 5, no, 6."),
        ("7", "It may be 5, 6 or 7."),
        ("3/4", r"\boxed{\frac34 \text{ or } 0.5}"),
        ("A", "Both A and C are correct."),
        ("A", r"\boxed{(A) or (C)}"),
        ("A", "The answer is (A) or (C)."),
        ("A", "The answer is A or C."),
    ],
)
def test_one_of_several_is_no_answer(reference: str, response: str) -> None:
    assert score(reference, response) == 0.0


@pytest.mark.parametrize(
    ("reference", "response"),
    [
        ("5", "The final answer is $5$. I hope it is correct."),
        ("5", "Final Answer: The final answer is $5$. I hope it is correct."),
        ("5", "The answer is 5. This is correct."),
        ("B", "The correct answer is B because the other options are incorrect."),
        ("D", "The answer is D, since A is not correct."),
        ("12", "The answer is 12, since the first attempt was wrong."),
        ("B", "## Final Answer\n\nThe correct answer is B."),
        ("Paris", "**Final Answer:** The answer is Paris."),
        ("B", r"\boxed{\text{Option B}}"),
        ("5", "The answer is 5. That is my answer."),
        ("5", "The answer is 5. This is the final answer."),
        ("5", "The answer is 5. My answer is correct."),
        ("5", "The answer is 5. I am sure that the solution is complete."),
        ("5", "The answer is 5. I hope this answer is helpful!"),
        ("5", "So x = 5. The answer is as follows."),
        ("5", "So x = 5. My answer is given above."),
        ("5", "The answer is 5. The answer is an integer."),
        ("correct", "The answer is correct."),
        ("valid", r"\boxed{\text{valid}}"),
        ("7", "#### Step 1: Add\n3+4=7\nThe answer is 7."),
        ("7", "##### Step 1: Add\n3+4=7\nThe answer is 7."),
        ("7", "#### 1. Add\n3+4=7\nThe answer is 7."),
        ("7", "#### Step 1\n3+4=7"),
        ("7", "3+4=7\n#### 7"),
        ("7", "3+4=7\n####7"),
        ("7", "3+4=7\n#### $7$"),
        ("7", "3+4=7\n#### 7 apples"),
        ("Paris", "It is the capital.\n#### Paris"),
        ("7", "#### 8\nNo, I forgot one. The answer is 7."),
        ("7", "The answer is 8.\n#### 7"),
        ("7", "<answer>8</answer> That was wrong. <answer>7</answer>"),
        ("7", "The result of step 1 is 3.\n\n## Final Answer\n\n7"),
        ("7", "The result of step 1 is 3.\n\n**Answer**\n\n7"),
        ("(3,4)", "The vertex is at (3, 4)."),
        ("(3,4)", "The answer is the point (3, 4)."),
        ("[2,5)", "So the values of x that we look for are those in [2, 5)."),
        (r"(-\infty,3]", r"So the values of x that we look for are those in (-\infty, 3]."),
        (r"(-\infty,3]", "So the values of x that we look for are those in (-∞, 3]."),
        ("(1,2,3)", "The vector that we were to find here is (1, 2, 3)."),
        (r"\{1,2\}", "So the values of x that we look for are those in {1, 2}."),
        ("7", "The function is f(3, 4) = 7 as we saw in the table."),
        ("6", "The answer is 5, no, 6."),
        ("5", "So 2 + 3 = 5. Hope this helps!"),
        ("5", "The answer is 5. This answer is consistent with the fact that 10 is even."),
        ("5", "The answer is 5. The result is unique."),
        ("5", "We get $x = 5.$ This is the only solution."),
        ("5", "Solution: We add 2 and 2.\nThen 4 + 1 = 5."),
        ("5", "The answer 5 is correct."),
        ("6", "Sam pays $5. The answer is $6."),
        ("29", "The probability is $5/24$, and $m+n=29$."),
        ("no solution", "There is no solution."),
        ("2:30", "The answer is 2:30."),
        ("25", "So we find for the circle that we drew x^2 + y^2 = 25."),
        ("24", "So there are 8x3=24 chairs in the three rows of that room."),
        ("5", "So the total is 5.\n\n---"),
        ("5", "Answer: 5\nThe answer was found by adding 2 and 3."),
        ("1000000", "It is 1 million dollars."),
        ("2 million", "So the whole town has 2 million trees in its woods."),
        ("720", r"The answer is $3! \times 5! = 720$."),
        ("12", "So we find\n\\begin{align*}\na + b &= 5 + 7 \\\\\n&= 12.\n\\end{align*}"),
        (
            r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}",
            "\\begin{align*}\na &= b \\\\\n&= \\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}.\n\\end{align*}",
        ),
    ],
)
def test_the_answer_is_found_among_sentences_about_it(reference: str, response: str) -> None:
    assert score(reference, response) == 1.0


@pytest.mark.parametrize(
    ("reference", "response"),
    [
        ("1", "#### Step 1: Add\n3+4=7\nThe answer is 7."),
        ("8", "#### 8\nNo, I forgot one. The answer is 7."),
        ("4", "The vertex is at (3, 4)."),
        ("4", "The answer is the point (3, 4)."),
        ("2", "So the values of x that we look for are those in {1, 2}."),
        ("correct", "The answer is 5. My answer is correct."),
        ("3", "The result of step 1 is 3.\n\n## Final Answer\n\n7"),
        ("(3,4)", "The vertex is at (3, 4]."),
        ("(3,4)", "The vertex is at (4, 3)."),
        ("4", "The vertex of the parabola is at (3.5, 4)."),
        ("3", r"The answer is \frac{\sqrt{3}}{3}."),
        ("2", "The answer is 2k."),
        ("3", "The answer is 2k + 3."),
        ("5", "So the length of the other side of it must be 5 - x."),
        ("2", "So the polynomial that we were to find here is x^2."),
        ("4", "Solution: 2 + 2 = 4.\nThen 4 + 1 = 5."),
        ("5", "The answer is not 5."),
        ("5", "5 is not the answer."),
        ("5", "5 is the wrong answer."),
        ("5", "The answer cannot be 5."),
        ("5", "So he has 5 apples (and 3 pears)."),
    ],
)
def test_a_part_of_the_answer_or_a_sentence_about_it_is_wrong(reference: str, response: str) -> None:
    assert score(reference, response) == 0.0


@pytest.mark.parametrize(
    "response",
    [
        "Option C is correct.", "Choice (C) is right.", "Answer C is correct.", "Option C", "Option (C).", "(C)", "C.",
        "The correct option is C.", "The correct choice is (C).", "C is the correct choice.", "I choose C.",
        "I would go with option (C).", "Answer: (C) 12", "Option C is correct. Option A is too small.",
        "C. 12", "The correct choice is C: 12.", "The answer is C, since 12 is even.", "Option C: 12",
        "**Option C** is the correct answer.",
    ],
)  # fmt: skip
def test_a_choice_may_be_named_in_words(response: str) -> None:
    assert (score("C", response), score("A", response)) == (1.0, 0.0)


@pytest.mark.parametrize(
    "response", ["Option C is wrong.", "Option C is not correct.", "I would not choose C.", "Options A, C.", "Not C."]
)
def test_a_choice_that_is_refused_is_no_answer(response: str) -> None:
    assert score("C", response) == 0.0


OPTIONS = "Which ocean is the largest?\n(A) the Atlantic Ocean\n(B) the Pacific Ocean\n(C) the Indian Ocean"
SHOTS = "Q: What is 3 + 5?\nA: 3 + 5 = 8. So the answer is 8.\n\nQ: What is 2 + 6?\nA:"


@pytest.mark.parametrize(
    ("reference", "response", "question"),
    [
        ("8", "2 + 6 = 8. So the answer is 8.", SHOTS),
        ("8", r"So it is certainly \boxed{8}.", r"Q: 3+5? So it is certainly \boxed{8}. Q: 2+6?"),
        ("B", "(B) the Pacific Ocean", OPTIONS),
        ("B", "I compared all of them.\n(B) the Pacific Ocean", OPTIONS),
        ("the Pacific Ocean", "the Pacific Ocean", OPTIONS),
        ("0.5", r"\boxed{\frac{1}{2}}", r"A coin shows heads with probability $\frac{1}{2}$. What of tails?"),
        ("1/2", r"\boxed{\frac{1}{2}}", r"A coin shows heads with probability $\frac{1}{2}$. What of tails?"),
        ("0.5", r"\boxed{1/2}", "What is 11/24 + 1/24?"),
        ("2", r"\boxed{4/2}", "What is 14/21 times 3?"),
        ("1.5", r"\boxed{1\frac{1}{2}}", r"From $1\frac{1}{2}$ take 0."),
    ],
)
def test_an_answer_that_stands_in_the_question_too_is_right(reference: str, response: str, question: str) -> None:
    assert score(reference, response, question) == 1.0


@pytest.mark.parametrize(
    ("reference", "response", "question"),
    [
        ("B", OPTIONS, OPTIONS),
        ("C", OPTIONS, OPTIONS),
        ("2", r"\boxed{8/4}", "What is 8/4?"),
        ("-4", r"\boxed{5 - 9}", "What is 5 - 9?"),
        ("2", r"\boxed{\frac{8}{4}}", r"What is $\frac{8}{4}$?"),
        ("8", SHOTS, SHOTS + " 2 + 6 = 9"),
        ("5", "The result of the first roll is 5.", "The result of the first roll is 5. What is twice that, minus 5?"),
        ("3", "Tom has 3 apples and buys some more of them.", "Tom has 3 apples and buys some more of them. How many?"),
    ],
)
def test_a_copy_of_the_question_is_no_answer(reference: str, response: str, question: str) -> None:
    assert score(reference, response, question) == 0.0


@pytest.mark.parametrize("noise", ["(" * 9900, "1" + "-" * 9900 + "x", "– " * 4900 + "x", "{" * 9900, "[1, " * 2400])
def test_a_response_without_sense_is_read_in_a_short_time(noise: str) -> None:
    begin = time.process_time()
    assert score("5", f"The answer is {noise}") == 0.0
    assert time.process_time() - begin < 5

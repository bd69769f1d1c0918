"""What an answer says: the letter of a choice, or yes or no (docs/evaluation.md, "Parsing").

The rules are those of VLMEvalKit without a judge, so that the same predictions give the same scores there and here.
"""

import re
from collections.abc import Mapping

NO_ANSWER = "Z"  # the letter for a refusal, which is never an option that is right
REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
AROUND_LETTERS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
SENTENCE = re.compile(r"(?i)(?:correct\s+)?answer\s+is\s+\**([ABCD])\**")
# Signs that stand between words, in the order in which they are taken out.
SIGNS = (";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", ",", "?", "!")
THOUSANDS = re.compile(r"(\d)(,)(\d)")
PERIOD = re.compile(r"(?<!\d)\.(?!\d)")
# A flag that the published evaluation passes in the place of a count; it changes texts of more periods than that alone.
MOST_PERIODS = int(re.UNICODE)


def parse_choice(answer: str, options: Mapping[str, str]) -> str | None:
    """The letter of the option that an answer names, "Z" for a refusal, None when it names none or several.

    One upper-case letter among the words counts when it stands in the last four or is all there is; then "the answer
    is B"; then the text of exactly one option inside an answer that is not much longer than all of them.
    """
    return _letter_in(answer, options) or _text_in(answer, options)


def _letter_in(answer: str, options: Mapping[str, str]) -> str | None:
    if any(refusal in answer for refusal in REFUSALS):
        return NO_ANSWER
    words = answer.translate(AROUND_LETTERS).split()
    named = [letter for letter in options if letter in words]
    if len(named) == 1 and words.index(named[0]) > len(words) - 5:
        return named[0]
    if not named and NO_ANSWER in words:
        return NO_ANSWER
    sentence = SENTENCE.search(answer)
    return sentence[1].upper() if sentence and sentence[1].upper() in options else None


def _text_in(answer: str, options: Mapping[str, str]) -> str | None:
    lowered, texts = answer.lower(), {letter: str(text).lower() for letter, text in options.items()}
    if len(lowered) > 2 * sum(map(len, options.values())):
        return None
    named = [letter for letter, text in texts.items() if text in lowered]
    return named[0] if len(named) == 1 else None


def parse_yes_no(answer: str) -> str | None:
    """ "Yes" or "No" when exactly one of the two words is there, else None."""
    words = without_signs(answer.lower()).split()
    if ("yes" in words) == ("no" in words):
        return None
    return "Yes" if "yes" in words else "No"


def without_signs(text: str) -> str:
    """Text without punctuation, as the VQA evaluation takes it out (Antol et al., 2015).

    A sign with a space beside it, or in a text with a number like 1,000, goes; any other becomes a space.
    """
    has_thousands, result = THOUSANDS.search(text) is not None, text
    for sign in SIGNS:
        stands_free = f"{sign} " in text or f" {sign}" in text
        result = result.replace(sign, "" if stands_free or has_thousands else " ")
    return PERIOD.sub("", result, count=MOST_PERIODS)

"""What a notebook asks: predictions before a result is seen, and exercises that are checked, each with one answer for all.

`predict` and `check` stand in the notebooks; `answer_key` prints every exercise with its answer for those who teach.
"""

from micelab.exercises import course as course
from micelab.exercises import whole as whole
from micelab.exercises.checking import EXERCISES, Exercise, Verdict, answer_key, check, exercise, limited
from micelab.exercises.predictions import Prediction, predict

__all__ = ["EXERCISES", "Exercise", "Prediction", "Verdict", "answer_key", "check", "exercise", "limited", "predict"]

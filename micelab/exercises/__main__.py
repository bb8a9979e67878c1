"""`python -m micelab.exercises` prints every exercise with its answer; `... 02 04` those of two notebooks."""

import sys

from micelab.exceptions import MicelabError
from micelab.exercises import answer_key

if __name__ == "__main__":
    try:
        sys.stdout.write(answer_key(*sys.argv[1:]))
    except MicelabError as error:
        sys.exit(str(error))

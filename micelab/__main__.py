"""`python -m micelab` is `micelab`; it is also what `accelerate launch -m micelab train` starts."""

from micelab.cli import main

if __name__ == "__main__":
    main()

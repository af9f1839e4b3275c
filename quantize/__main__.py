"""`python -m nvquant`, which `accelerate launch -m nvquant` needs too."""

from .cli.main import main

if __name__ == "__main__":
    main()

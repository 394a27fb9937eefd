"""``python -m slm_pipeline`` is ``slm``."""

from slm_pipeline.cli import main

if __name__ == "__main__":
    main()

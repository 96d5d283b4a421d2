"""``python -m megatron_dypo.config > docs/configuration.md``: the reference page, from the schema alone."""

from megatron_dypo.config.render import page

if __name__ == "__main__":
    print(page(), end="")

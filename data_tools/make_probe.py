"""Generate texts whose answers stand at a known distance: copy, associative recall, pass key."""

from ecp_scale.commands.make_probe import main

if __name__ == "__main__":
    main()

from bagel_opt.cli.commands import main

if __name__ == "__main__":
    raise SystemExit(main())

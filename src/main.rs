//! The command line program: everything is in `rarebit::cli`.

fn main() -> std::process::ExitCode {
    rarebit::cli::main()
}

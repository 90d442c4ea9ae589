//! The engine's side of `bench.py`: loads one network, then runs it once and prints the seconds for every line on stdin.

use rarebit::exec::cpu::Cpu;
use rarebit::pipeline::Pipeline;
use rarebit::pipeline::networks::Networks;
use rarebit::program::DType;
use rarebit::sampler::LATENTS;
use rarebit::weights::Model;
use std::error::Error;
use std::io::BufRead;
use std::path::Path;
use std::time::Instant;

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [model, kind, sizes @ ..] = &args[..] else {
        return Err("usage: bench_cpu MODEL unet|unet-gradient|decode|decode-gradient H W BATCH".into());
    };
    let sizes: Vec<usize> = sizes.iter().map(|s| s.parse()).collect::<Result<_, _>>()?;
    let [height, width, batch] = sizes[..] else { return Err("give latent height, width and batch".into()) };
    // Threads: RAYON_NUM_THREADS, else one per core.
    let pool = rayon::ThreadPoolBuilder::new().build()?;
    let outcome: Result<(), String> =
        pool.install(|| serve(Path::new(model), kind, [batch, 4, height, width]).map_err(|e| e.to_string()));
    Ok(outcome?)
}

fn serve(model: &Path, kind: &str, shape: [usize; 4]) -> Result<(), Box<dyn Error>> {
    let mut pipeline = Pipeline::open(Model::open(model)?, None)?;
    let context = shape[0] * pipeline.tokens() * pipeline.config.unet.context_width;
    // The network alone, as on torch's side: the peak memory is compared too.
    pipeline.tokenizers.clear();
    let mut cpu = Cpu::<f32>::new();
    let mut networks = Networks::new(&pipeline, &mut cpu, DType::F32);
    let added = pipeline.config.unet.added.is_some();
    let program = match kind {
        "unet" => networks.load_unet(shape, context, added)?,
        "unet-gradient" => networks.load_unet_gradient(shape, context, added, &[LATENTS])?,
        "decode" => networks.load_decoder(shape)?,
        "decode-gradient" => networks.load_decoder_gradient(shape)?,
        other => return Err(format!("unknown network '{other}'").into()),
    };
    println!("ready");
    for line in std::io::stdin().lock().lines() {
        line?;
        let start = Instant::now();
        networks.run(program)?;
        println!("{}", start.elapsed().as_secs_f64());
    }
    Ok(())
}

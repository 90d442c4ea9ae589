//! Resizing is torch's, pixel for pixel, and so is its gradient: `tests/data/resize.safetensors`, by `tools/reference/dump_resize.py`.

use rarebit::exec::cpu::{Cpu, Real};
use rarebit::exec::{Data, DataMut, Executor};
use rarebit::plan::plan;
use rarebit::program::*;
use rarebit::weights::Model;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView, serialize_to_file};

fn tensor(golden: &SafeTensors<'_>, name: &str) -> (Vec<usize>, Vec<f64>) {
    let view = golden.tensor(name).unwrap();
    assert_eq!(view.dtype(), Dtype::F64);
    let values = view.data().as_chunks().0.iter().map(|bytes| f64::from_le_bytes(*bytes)).collect();
    (view.shape().to_vec(), values)
}

fn run<T: Real>(input: &(Vec<usize>, Vec<f64>), op: impl Fn(ValueId) -> Resample) -> Vec<f64> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let view = TensorView::new(Dtype::F32, vec![1], &[0; 4]).unwrap();
    serialize_to_file([("model.diffusion_model.unused", view)], None, &path).unwrap();

    let mut b = Builder::new("resize", T::DTYPE);
    let x = b.input("x", &input.0);
    let out = b.push(Op::Resample(op(x)))[0];
    let len = b.shape(out).iter().product();
    b.output("out", out);
    let mut cpu = Cpu::<T>::new().with_guards(true);
    let planned = plan(b.finish().unwrap(), |program, node| cpu.workspace(program, node));
    let id = cpu.load(planned, &Model::open(&path).unwrap()).unwrap();
    cpu.write("x", Data::F64(&input.1)).unwrap();
    cpu.run(id).unwrap();
    let mut out = vec![0.0; len];
    cpu.read("out", DataMut::F64(&mut out)).unwrap();
    out
}

fn worst(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

#[test]
fn resizing_is_that_of_torch() {
    let bytes = std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/resize.safetensors")).unwrap();
    let golden = SafeTensors::deserialize(&bytes).unwrap();
    let mut cases = 0;
    for name in golden.names().into_iter().filter_map(|name| name.strip_suffix("/y")) {
        let (case, method) = name.split_once('/').unwrap();
        let filter = if method.starts_with("bicubic") { Filter::Bicubic } else { Filter::Bilinear };
        let how = Interpolation { filter, antialias: method.ends_with("antialias") };
        let [x, d_y] = ["x", "d_y"].map(|what| tensor(&golden, &format!("{case}/{what}")));
        let [y, d_x] = ["y", "d_x"].map(|what| tensor(&golden, &format!("{name}/{what}")).1);
        let [before, after] = [&x, &d_y].map(|image| [image.0[1], image.0[2]]);
        let forward = |x| Resample::Resize { x, height: after[0], width: after[1], how };
        let backward = |d_y| Resample::ResizeBackward { d_y, height: before[0], width: before[1], how };
        let off = [
            worst(&run::<f64>(&x, forward), &y),
            worst(&run::<f64>(&d_y, backward), &d_x),
            worst(&run::<f32>(&x, forward), &y),
            worst(&run::<f32>(&d_y, backward), &d_x) / d_x.iter().fold(1.0, |m: f64, x| m.max(x.abs())),
        ];
        assert!(off[0] < 1e-13 && off[1] < 1e-13 && off[2] < 1e-6 && off[3] < 1e-6, "{name}: {off:?}");
        cases += 1;
    }
    assert_eq!(cases, 28, "golden file is incomplete");
}

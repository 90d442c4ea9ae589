//! What the shared cases do not say of attention's and the norms' gradients: parts equal the whole, bad targets are named,
//! rows without a target count nothing, and large logits overflow nowhere.

use crate::common::inputs::{no_weights, noise, run};
use crate::common::naive::Buffers;
use rarebit::exec::cpu::Cpu;
use rarebit::exec::{Data, Executor};
use rarebit::plan::plan;
use rarebit::program::*;

/// Self-attention of 600 causal tokens, two heads, and its gradients where asked for.
fn gradients(to_q: bool, to_kv: bool) -> Vec<Vec<f64>> {
    let mut b = Builder::new("p", DType::F32);
    let qkv = b.input("qkv", &[2, 600, 3 * 48]);
    let d_out = b.input("d_out", &[2, 600, 48]);
    let cols = |at| Cols { value: qkv, at };
    let forward = Attention { q: cols(0), k: cols(48), v: cols(96), heads: 2, head_dim: 24, causal: true };
    let made = b.push(Op::Attention(forward.clone()));
    let backward = AttentionBackward { forward, out: made[0], lse: made[1], d_out, to_q, to_kv };
    for (i, id) in b.push(Op::AttentionBackward(backward)).into_iter().enumerate() {
        b.output(format!("out{i}"), id);
    }
    let mut buffers = Buffers::default();
    for (name, len) in [("qkv", 2 * 600 * 3 * 48), ("d_out", 2 * 600 * 48)] {
        buffers.floats.insert(name.into(), noise(name, 0, len));
    }
    run(Cpu::<f32>::new(), &b.finish().unwrap(), &buffers, &no_weights(), 1)
}

#[test]
fn gradients_of_attention_asked_for_alone_have_the_same_bits() {
    let all = gradients(true, true);
    assert!(gradients(true, false)[..] == all[..1]);
    assert!(gradients(false, true)[..] == all[1..]);
}

/// Loss, log-sum-exp and gradient of two rows of five logits.
fn cross_entropy(logits: [f32; 10], targets: [i32; 2]) -> rarebit::Result<[Vec<f64>; 3]> {
    let mut b = Builder::new("p", DType::F32);
    let (logits_id, d_loss) = (b.input("logits", &[2, 5]), b.input("d_loss", &[2]));
    let targets_id = b.input_i32("targets", &[2]);
    let made = b.push(Op::Rowwise(Rowwise::CrossEntropy { logits: logits_id, targets: targets_id }));
    let backward = Rowwise::CrossEntropyBackward { logits: logits_id, targets: targets_id, lse: made[1], d_loss };
    let d_logits = b.push(Op::Rowwise(backward))[0];
    for (name, id) in [("loss", made[0]), ("lse", made[1]), ("d_logits", d_logits)] {
        b.output(name, id);
    }
    let mut cpu = Cpu::<f32>::new().with_guards(true);
    let planned = plan(b.finish()?, |program, node| cpu.workspace(program, node));
    let id = cpu.load(planned, &no_weights())?;
    cpu.write("logits", Data::F32(&logits))?;
    cpu.write("d_loss", Data::F32(&[1.0, 1.0]))?;
    cpu.write("targets", Data::I32(&targets))?;
    cpu.run(id)?;
    let read = |name, len| {
        let mut out = vec![0.0; len];
        cpu.read(name, rarebit::exec::DataMut::F64(&mut out)).map(|()| out)
    };
    Ok([read("loss", 2)?, read("lse", 2)?, read("d_logits", 10)?])
}

#[test]
fn a_target_beyond_the_vocabulary_is_named() {
    let message = cross_entropy([0.0; 10], [4, 5]).unwrap_err().to_string();
    assert!(message.contains("target 5 is not in 0..5") && message.contains("cross_entropy"), "{message}");
}

#[test]
fn rows_without_a_target_count_nothing_and_large_logits_stay_finite() {
    let row = [3e4, -3e4, 0.0, 3e4, 1.0];
    let [loss, lse, d] = cross_entropy([row, row].concat().try_into().unwrap(), [1, -1]).unwrap();
    assert!((loss[0] - 6e4 - 2f64.ln()).abs() < 0.01 && loss[1] == 0.0, "{loss:?}");
    assert!(lse.iter().all(|lse| (lse - 3e4 - 2f64.ln()).abs() < 0.01), "{lse:?}");
    let expected = [0.5, -1.0, 0.0, 0.5, 0.0];
    assert!(d[..5].iter().zip(expected).all(|(d, e)| (d - e).abs() < 2e-3), "{d:?}");
    assert!(d[5..].iter().all(|&d| d == 0.0), "{d:?}");
}

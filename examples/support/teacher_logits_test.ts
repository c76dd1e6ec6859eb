import { assertEquals, assertRejects } from "@std/assert";
import { init, saveSafetensors, Scope, type Tensor, tensor } from "@limbeck/limbeck";
import { loadTeacherLogits } from "./teacher_logits.ts";

Deno.test("teacher logits: what is no teacher is refused when it is read", async () => {
  await init();
  using _scope = new Scope();
  const out = await Deno.makeTempDir(), path = `${out}/teacher.safetensors`, vocabulary = [..."abcd"];
  const load = async (tensors: Record<string, Tensor>, metadata?: Record<string, string>) => {
    await saveSafetensors(path, tensors, metadata);
    return await loadTeacherLogits(path, vocabulary);
  };
  const tokens = tensor(Int32Array.of(0, 1)), indices = tensor(Int32Array.of(0, 1, 2, 3), [2, 2]);
  const dense = (last: number) => ({ tokens, logits: tensor([[0, 0, 0, 0], [0, 0, 0, last]]) });
  const values = tensor([[1, 0], [1, 0]]), least = Math.log(Math.E + 1);
  const top = (more: Record<string, Tensor>) => ({ tokens, values, indices, ...more });

  const rows = new Float32Array(8);
  (await load(top({ logSumExp: tensor(Float32Array.of(least - 5e-4, 1.7)) }))).copyRows(0, 2, rows);
  assertEquals([...rows.subarray(0, 2), ...rows.subarray(6)], [1, 0, 1, 0]);
  const { tokens: read } = await load({ ...dense(0), tokens: tensor(Uint32Array.of(0, 1), [2]) });
  assertEquals(read, Int32Array.of(0, 1)); // what `nn.generate` takes
  assertEquals((await load(dense(0), { vocabulary: "wxyz" })).vocabulary, [..."wxyz"]);
  const none = tensor(new Float32Array(0), [2, 0]);
  for (
    const [tensors, message] of [
      [{ logits: tensor([[0]]) }, 'no tensor "tokens" among logits'],
      [{ ...dense(0), tokens: tensor(Int32Array.of(0, 4)) }, "tokens must be classes in [0, 4), got 4"],
      [{ tokens, logits: tensor(new Int32Array(8), [2, 4]) }, "logits must hold floats, got i32"],
      [dense(NaN), "logits must be finite, got NaN"],
      [dense(-Infinity), "logits must be finite, got -Infinity"],
      [top({ values: tensor([[1, 0], [Infinity, 0]]) }), "values must be finite, got Infinity"],
      [
        top({ values: none, indices: tensor(new Int32Array(0), [2, 0]) }),
        "values must have at least one class a row, got [2,0]",
      ],
      [
        top({ indices: tensor(Int32Array.of(0, 1, 2, 2), [2, 2]) }),
        "indices must differ within a row, got [2,2] in row 1",
      ],
      [
        top({ logSumExp: tensor(Float32Array.of(2, 1)) }),
        "logSumExp must be that of a row whose largest are the values, 1.313",
      ],
      [top({ logSumExp: tensor(Float32Array.of(1.7, 800)) }), "to 1.7436683806286792 in row 1, got 800"],
    ] as [Record<string, Tensor>, string][]
  ) await assertRejects(() => load(tensors), Error, message);
  await Deno.remove(out, { recursive: true });
});

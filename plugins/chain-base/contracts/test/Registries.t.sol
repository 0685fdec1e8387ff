// SPDX-License-Identifier: MIT OR Apache-2.0
pragma solidity ^0.8.28;

import {Base} from "./Base.sol";
import {TestVerifier} from "./Parties.sol";
import {NodeRegistry} from "../src/NodeRegistry.sol";
import {ModelRegistry} from "../src/ModelRegistry.sol";
import {ProofHub} from "../src/ProofHub.sol";
import {INodeRegistry} from "../src/interfaces/INodeRegistry.sol";
import {Ownable} from "@openzeppelin/contracts/access/Ownable.sol";

contract RegistriesTest is Base {
    string[] internal none;

    function setUp() public {
        deployAll();
        vm.deal(ANYONE, 100 ether);
    }

    function refused(address from, uint256 value, address payout, bytes memory peerId, string[] memory addrs, bytes memory error_) internal {
        vm.prank(from);
        vm.expectRevert(error_);
        nodes.register{value: value}(payout, peerId, 0, addrs);
    }

    function test_register_stores_the_node_and_refuses_bad_ones() public {
        INodeRegistry.Node memory n = nodes.node(hot);
        yes(n.hotKey == hot && n.payout == PAYOUT && n.state == INodeRegistry.NodeState.Active, "stored");
        eq(n.stake, 5 ether, "stake");
        yes(n.peerIdHash == keccak256(hex"0024080112") && n.recordHash == keccak256("record"), "hashes");
        yes(nodes.nodeOf(hot) == hot && nodes.payoutOf(hot) == PAYOUT && nodes.activeHotKey(hot) == hot, "views");
        refused(ANYONE, 1 ether, address(0), "p", none, abi.encodeWithSelector(NodeRegistry.ZeroAddress.selector));
        refused(ANYONE, 1 ether, ANYONE, "p", none, abi.encodeWithSelector(NodeRegistry.PayoutIsHotKey.selector, ANYONE));
        refused(ANYONE, 1 ether - 1, PAYOUT, "p", none, abi.encodeWithSelector(NodeRegistry.StakeTooSmall.selector, 1 ether - 1, 1 ether));
        refused(ANYONE, 1 ether, PAYOUT, "", none, abi.encodeWithSelector(NodeRegistry.PeerIdLength.selector, 0, 64));
        refused(ANYONE, 1 ether, PAYOUT, new bytes(65), none, abi.encodeWithSelector(NodeRegistry.PeerIdLength.selector, 65, 64));
        refused(ANYONE, 1 ether, PAYOUT, "p", new string[](9), abi.encodeWithSelector(NodeRegistry.TooManyMultiaddrs.selector, 9, 8));
        string[] memory long = new string[](1);
        long[0] = string(new bytes(257));
        refused(ANYONE, 1 ether, PAYOUT, "p", long, abi.encodeWithSelector(NodeRegistry.MultiaddrTooLong.selector, 0, 257, 256));
        refused(hot, 1 ether, PAYOUT, "p", none, abi.encodeWithSelector(NodeRegistry.AlreadyRegistered.selector, hot));
    }

    function test_update_is_for_the_hot_key() public {
        vm.prank(hot);
        nodes.update("peer", keccak256("r2"), none);
        yes(nodes.node(hot).recordHash == keccak256("r2"), "updated");
        vm.prank(PAYOUT);
        vm.expectRevert(abi.encodeWithSelector(NodeRegistry.UnknownNode.selector, address(0)));
        nodes.update("peer", 0, none);
    }

    function test_the_hot_key_moves_nothing() public {
        bytes memory error_ = abi.encodeWithSelector(NodeRegistry.NotPayout.selector, hot, PAYOUT);
        vm.prank(hot);
        vm.expectRevert(error_);
        nodes.setPayout(hot, ANYONE);
        vm.prank(hot);
        vm.expectRevert(error_);
        nodes.setHotKey(hot, ANYONE);
        vm.prank(hot);
        nodes.beginExit(hot);
        vm.warp(block.timestamp + EXIT_DELAY);
        vm.prank(hot);
        nodes.finishExit(hot);
        vm.prank(hot);
        vm.expectRevert(abi.encodeWithSelector(NodeRegistry.NothingToWithdraw.selector, hot));
        nodes.withdraw(payable(hot));
        eq(nodes.credits(PAYOUT), 5 ether, "payout");
    }

    function test_hot_keys_and_payouts_are_exclusive() public {
        vm.prank(PAYOUT);
        vm.expectRevert(abi.encodeWithSelector(NodeRegistry.HotKeyInUse.selector, hot2, hot2));
        nodes.setHotKey(hot, hot2);
        vm.prank(PAYOUT2);
        nodes.setHotKey(hot2, address(0xB0B));
        vm.prank(PAYOUT);
        vm.expectRevert(abi.encodeWithSelector(NodeRegistry.HotKeyInUse.selector, hot2, hot2));
        nodes.setHotKey(hot, hot2);
        vm.prank(PAYOUT);
        vm.expectRevert(abi.encodeWithSelector(NodeRegistry.PayoutIsHotKey.selector, PAYOUT));
        nodes.setHotKey(hot, PAYOUT);
        vm.prank(PAYOUT);
        vm.expectRevert(abi.encodeWithSelector(NodeRegistry.PayoutIsHotKey.selector, hot));
        nodes.setPayout(hot, hot);
        vm.prank(PAYOUT);
        vm.expectRevert(abi.encodeWithSelector(NodeRegistry.ZeroAddress.selector));
        nodes.setHotKey(hot, address(0));
        vm.prank(PAYOUT);
        vm.expectRevert(abi.encodeWithSelector(NodeRegistry.ZeroAddress.selector));
        nodes.setPayout(hot, address(0));
        vm.prank(PAYOUT2);
        nodes.setHotKey(hot2, hot2);
        yes(nodes.nodeOf(address(0xB0B)) == address(0) && nodes.nodeOf(hot2) == hot2, "back again");
    }

    function test_a_key_named_by_another_node_can_still_register() public {
        vm.prank(PAYOUT);
        nodes.setHotKey(hot, ANYONE);
        vm.prank(ANYONE);
        nodes.register{value: 1 ether}(address(0xCAFE), "p", 0, none);
        yes(nodes.nodeOf(ANYONE) == ANYONE && nodes.node(hot).hotKey == address(0), "taken back");
        vm.prank(PAYOUT);
        nodes.setHotKey(hot, hot);
        yes(nodes.nodeOf(hot) == hot && nodes.nodeOf(address(0)) == address(0), "own key again");
    }

    function test_exit_waits_for_the_delay() public {
        vm.prank(ANYONE);
        vm.expectRevert(abi.encodeWithSelector(NodeRegistry.NotHotKeyNorPayout.selector, ANYONE));
        nodes.beginExit(hot);
        vm.expectRevert(abi.encodeWithSelector(NodeRegistry.ExitNotStarted.selector, hot, INodeRegistry.NodeState.Active));
        nodes.finishExit(hot);
        vm.prank(PAYOUT);
        nodes.beginExit(hot);
        uint256 exitAt = block.timestamp + EXIT_DELAY;
        vm.prank(PAYOUT);
        vm.expectRevert(abi.encodeWithSelector(NodeRegistry.NodeNotActive.selector, hot, INodeRegistry.NodeState.Exiting));
        nodes.beginExit(hot);
        vm.prank(ANYONE);
        vm.expectRevert(abi.encodeWithSelector(NodeRegistry.NodeNotActive.selector, hot, INodeRegistry.NodeState.Exiting));
        nodes.addStake{value: 1}(hot);
        vm.warp(exitAt - 1);
        vm.expectRevert(abi.encodeWithSelector(NodeRegistry.ExitTooEarly.selector, exitAt - 1, exitAt));
        nodes.finishExit(hot);
        vm.warp(exitAt);
        vm.prank(ANYONE);
        nodes.finishExit(hot);
        vm.prank(PAYOUT);
        vm.expectRevert(abi.encodeWithSelector(NodeRegistry.ZeroAddress.selector));
        nodes.withdraw(payable(address(0)));
        vm.prank(PAYOUT);
        nodes.withdraw(payable(address(0xD00D)));
        eq(address(0xD00D).balance, 5 ether, "stake is back");
        refused(hot, 1 ether, PAYOUT, "p", none, abi.encodeWithSelector(NodeRegistry.AlreadyRegistered.selector, hot));
    }

    function test_exit_waits_for_bonds() public {
        vm.prank(address(escrow));
        nodes.lockBond(hot, 1 ether);
        vm.prank(PAYOUT);
        nodes.beginExit(hot);
        vm.warp(block.timestamp + EXIT_DELAY);
        vm.expectRevert(abi.encodeWithSelector(NodeRegistry.BondsStillLocked.selector, 1 ether));
        nodes.finishExit(hot);
        vm.prank(address(escrow));
        nodes.slash(hot, 1 ether, 0.25 ether, 7);
        nodes.finishExit(hot);
        eq(nodes.credits(PAYOUT), 4.75 ether, "rest");
        eq(address(escrow).balance, 0.25 ether, "slashed");
    }

    function test_bonds_are_the_escrows_business() public {
        bytes memory error_ = abi.encodeWithSelector(NodeRegistry.NotEscrow.selector, OWNER);
        vm.prank(OWNER);
        vm.expectRevert(error_);
        nodes.lockBond(hot, 1);
        vm.prank(OWNER);
        vm.expectRevert(error_);
        nodes.unlockBond(hot, 1);
        vm.prank(OWNER);
        vm.expectRevert(error_);
        nodes.slash(hot, 1, 1, 1);
        vm.prank(address(escrow));
        vm.expectRevert(abi.encodeWithSelector(NodeRegistry.BondExceedsFreeStake.selector, 2, 1));
        nodes.slash(hot, 1, 2, 1);
    }

    function test_a_node_below_the_minimum_serves_again_after_adding_stake() public {
        vm.prank(address(escrow));
        nodes.lockBond(hot, 4.5 ether);
        vm.prank(address(escrow));
        nodes.slash(hot, 4.5 ether, 4.5 ether, 1);
        bytes memory error_ = abi.encodeWithSelector(NodeRegistry.StakeTooSmall.selector, 0.5 ether, 1 ether);
        vm.expectRevert(error_);
        nodes.activeHotKey(hot);
        vm.prank(address(escrow));
        vm.expectRevert(error_);
        nodes.lockBond(hot, 0);
        vm.prank(ANYONE);
        nodes.addStake{value: 0.5 ether}(hot);
        yes(nodes.activeHotKey(hot) == hot, "active");
    }

    function test_models_are_named_by_content() public {
        bytes32 file = keccak256("file");
        vm.prank(ANYONE);
        bytes32 id = models.registerModel(file, 0, "hf:a/b", "B");
        yes(id == keccak256(abi.encode(file, bytes32(0))), "id");
        vm.expectRevert(abi.encodeWithSelector(ModelRegistry.ModelExists.selector, id));
        models.registerModel(file, 0, "elsewhere", "C");
        vm.expectRevert(abi.encodeWithSelector(ModelRegistry.ZeroFileHash.selector));
        models.registerModel(0, 0, "", "");
        vm.expectRevert(abi.encodeWithSelector(ModelRegistry.StringTooLong.selector, 513, 512));
        models.registerModel(keccak256("f2"), 0, string(new bytes(513)), "");
        vm.expectRevert(abi.encodeWithSelector(ModelRegistry.StringTooLong.selector, 129, 128));
        models.registerModel(keccak256("f2"), 0, "", string(new bytes(129)));
        vm.expectRevert(abi.encodeWithSelector(Ownable.OwnableUnauthorizedAccount.selector, address(this)));
        models.flag(id, "");
        vm.prank(OWNER);
        models.flag(id, "licence");
        yes(models.model(id).flagged, "flagged");
        vm.prank(OWNER);
        models.unflag(id, "");
        yes(!models.model(id).flagged && models.model(id).registeredBy == ANYONE, "unflagged");
        vm.prank(OWNER);
        vm.expectRevert(abi.encodeWithSelector(ModelRegistry.UnknownModel.selector, file));
        models.flag(file, "");
    }

    function test_a_verifier_is_set_once() public {
        address verifier = address(new TestVerifier());
        vm.expectRevert(abi.encodeWithSelector(Ownable.OwnableUnauthorizedAccount.selector, address(this)));
        proofs.setVerifier(1, 0, verifier, "s");
        vm.prank(OWNER);
        vm.expectRevert(abi.encodeWithSelector(ProofHub.KindZero.selector));
        proofs.setVerifier(0, 0, verifier, "s");
        vm.prank(OWNER);
        vm.expectRevert(abi.encodeWithSelector(ProofHub.NoCodeAt.selector, ANYONE));
        proofs.setVerifier(1, 0, ANYONE, "s");
        vm.prank(OWNER);
        vm.expectRevert(abi.encodeWithSelector(ProofHub.StatementLength.selector, 0, 2048));
        proofs.setVerifier(1, 0, verifier, "");
        vm.prank(OWNER);
        proofs.setVerifier(1, 0, verifier, "s");
        yes(proofs.verifierOf(1, 0) == verifier && keccak256(bytes(proofs.statementOf(1, 0))) == keccak256("s"), "set");
        vm.prank(OWNER);
        vm.expectRevert(abi.encodeWithSelector(ProofHub.VerifierAlreadySet.selector, 1, bytes32(0), verifier));
        proofs.setVerifier(1, 0, verifier, "t");
    }
}
